"""Fresh processes: optional packages stay out of a stage until the run asks for them, and are there when it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NOT_ASKED_FOR = """
import sys
import llava_compete.train.run
from tiny import tiny_model
from llava_compete.model.lora import LoraSettings, add_adapters
add_adapters(tiny_model()[0], {"language": LoraSettings(), "projector": LoraSettings()})
print([name for name in ("wandb", "bitsandbytes") if name in sys.modules])
"""
ASKED_FOR = """
from peft.import_utils import is_bnb_4bit_available
from transformers.integrations import is_wandb_available
assert is_wandb_available() and is_bnb_4bit_available()
print([name for name in ("wandb", "bitsandbytes") if name in sys.modules])
"""


def _run(code: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # else DeepSpeed guesses it, with a line on the output
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_a_stage_imports_neither_wandb_nor_bitsandbytes_unless_asked() -> None:
    pytest.importorskip("deepspeed")
    assert _run(NOT_ASKED_FOR + ASKED_FOR) == ["[]", "['wandb', 'bitsandbytes']"]
