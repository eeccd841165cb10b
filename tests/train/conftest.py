"""Data and a reference run that the tests of launched stages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_kit import train_launched
from stage_kit import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=48)


@pytest.fixture(scope="session")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no DeepSpeed, 8 rows at once."""
    folder = tmp_path_factory.mktemp("reference")
    return train_launched(data, folder, "reference", 8, 1, processes=1, deepspeed=None)
