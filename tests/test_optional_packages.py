"""A fresh process that imports this package before transformers, which then knows the model; optional packages stay
out of a stage until the run asks for them, and are there when it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FIRST = """
import llava_compete, transformers, tempfile
from tiny import tiny_model
with tempfile.TemporaryDirectory() as folder:
    tiny_model()[0].config.save_pretrained(folder)
    print(transformers.AutoConfig.from_pretrained(folder).stage)
"""
NOT_ASKED_FOR = """
import llava_compete.train.run
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


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines that one process writes."""
    pytest.importorskip("deepspeed")
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{FIRST + NOT_ASKED_FOR + ASKED_FOR}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}  # else DeepSpeed guesses it, with a line on the output
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_imported_before_transformers_it_registers(printed: list[str]) -> None:
    assert printed[0] == "initial"


def test_a_stage_imports_neither_wandb_nor_bitsandbytes_unless_asked(printed: list[str]) -> None:
    assert printed[1:] == ["[]", "['wandb', 'bitsandbytes']"]
