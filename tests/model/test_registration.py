"""A fresh process: registration after transformers, no import hook, no need of DeepSpeed, and the pipeline call.

Imported before transformers: tests/test_optional_packages.py, whose process imports in that order.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

from llava_compete.model.build import save_checkpoint

# None in sys.modules is how Python says "not installed": both an import and importlib.util.find_spec see it.
WITHOUT_DEEPSPEED = """
import sys
for name in ("deepspeed", "peft", "datasets", "lmms_eval", "bitsandbytes", "flash_attn"):
    sys.modules[name] = None
"""
ANSWER = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
directory = sys.argv[1]
processor = AutoProcessor.from_pretrained(directory)
model = AutoModelForImageTextToText.from_pretrained(directory).eval()
messages = [{"role": "user", "content": [
    {"type": "image", "image": Image.new("RGB", (30, 40), "red")}, {"type": "text", "text": "how many ?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=5)
plain = processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
pipe = pipeline("image-text-to-text", model=directory)
answer = pipe(text=messages, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
assert answer == plain, (answer, plain)
print("answered")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_checkpoint(*tiny_model(moe={"language": {}}), directory)
    return directory


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, timeout=1000
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_loads_and_answers_without_deepspeed(saved: Path) -> None:
    """With transformers imported first; nor do `plan` and `info` need DeepSpeed, and no import hook is left."""
    code = WITHOUT_DEEPSPEED + "import torch, transformers\nbefore = list(sys.meta_path)\n"  # torch adds finders
    code += "import llava_compete\nassert sys.meta_path == before\n" + ANSWER
    code += "for name in [name for name in sys.modules if sys.modules[name] is None and name != 'deepspeed']:\n"
    code += "    del sys.modules[name]\nimport llava_compete.plan.info, llava_compete.plan.plan"
    assert "answered" in run(code, str(saved))
