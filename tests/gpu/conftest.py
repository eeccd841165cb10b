"""The device of these tests. GPU_TESTS_ON_CPU=1 runs them on a CPU, to try the tests themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))  # block_kit, slow_moe


@pytest.fixture(scope="session")
def device() -> torch.device:
    if os.environ.get("GPU_TESTS_ON_CPU"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
