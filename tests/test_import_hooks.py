"""Fresh processes: optional packages stay out of a stage until the run asks for them, and are there when it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NOT_ASKED_FOR = """
import sys
import llava_compete.train.run, open_clip
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
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


def test_a_stage_imports_neither_wandb_nor_bitsandbytes_unless_asked() -> None:
    pytest.importorskip("deepspeed")
    assert _run(NOT_ASKED_FOR + ASKED_FOR) == ["[]", "['wandb', 'bitsandbytes']"]


def test_a_context_runs_around_the_first_import_only(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text("import importlib.util\nfound = importlib.util.find_spec('absent')\n")
    (tmp_path / "absent.py").touch()
    code = f"""
import functools, sys
sys.path.insert(0, {str(tmp_path)!r})
from llava_compete.import_hooks import import_inside, not_installed
finders = len(sys.meta_path)
import_inside("probe", functools.partial(not_installed, "absent"))
import probe, absent
print(probe.found, absent.__name__, type(probe.__loader__).__name__, len(sys.meta_path) - finders)
import_inside("probe", lambda: 1 / 0)
import probe
with not_installed("absent"):
    import absent
print("absent" in sys.modules)
"""
    assert _run(code) == ["None absent SourceFileLoader 0", "True"]
