"""Export to transformers' Llava: what loads it does not know this package, and its logits are ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_hf_kit import TEXTS, pictures, siglip_tower
from tiny import tiny_model
from tower_kit import TIMM
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_compete.cli import main
from llava_compete.convert.exporting import export_checkpoint
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint

QWEN3 = {"model_type": "qwen3", "head_dim": 8}
EXPORTED: dict[str, dict[str, Any]] = {
    "dense": {},
    "class_token": {"select": "cls_patch", "feature_layer": -1},
    "siglip": {"tower": siglip_tower(), "language": {"model_type": "qwen2", "tie_word_embeddings": True}},
    "mixtral": {"moe": {"language": {"num_experts": 3, "router": "competition"}}},
    "mistral_to_mixtral": {"language": {"model_type": "mistral"}, "moe": {"language": {"router": "softmax"}}},
    "qwen3_moe": {"language": QWEN3, "moe": {"language": {"layers": [1], "num_experts_per_tok": 3}}},
}


def saved(directory: Path, **options: Any) -> Path:
    model, processor = tiny_model(**options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1 / 3 if parameter.ndim == 1 or "router" in name else 0.15)
    save_checkpoint(model, processor, directory)
    return directory


SLOW = {"siglip"}  # of width 768


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXPORTED])
def test_transformers_logits_are_ours(case: str, tmp_path: Path) -> None:
    saved(tmp_path / "ours", **EXPORTED[case])
    export_checkpoint(tmp_path / "ours", tmp_path / "hf")
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, _ = load_checkpoint(tmp_path / "ours")
    inputs = AutoProcessor.from_pretrained(tmp_path / "hf")(
        text=TEXTS, images=pictures(), return_tensors="pt", padding=True, padding_side="left"
    )
    with torch.no_grad():
        ours, expected = model(**inputs).logits, theirs.eval()(**inputs).logits
    assert float(ours.std()) > 0.1
    torch.testing.assert_close(expected, ours, rtol=0, atol=2e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "text_only": ({"tower": None}, "a text-only model"),
    "tower_experts": ({"moe": {"vision": {}}}, r"the vision has experts \(moe\.vision\)"),
    "projector_experts": ({"moe": {"projector": {}}}, r"the projector has experts \(moe\.projector\)"),
    "router": ({"moe": {"language": {"router": "sigmoid"}}}, "moe.language.router: 'sigmoid' has no equal"),
    "family": (
        {"language": {"model_type": "gemma"}, "moe": {"language": {}}},
        "no family that is 'gemma'",
    ),
    "layers": ({"moe": {"language": {"layers": [1]}}}, "layer 0 is dense, and all layers of mixtral have experts"),
    "bias": ({"language": {"attention_bias": True}, "moe": {"language": {}}}, "attention_bias: found true"),
    "scales": ({"scales": [1, 2]}, r"S² scales \[1, 2\]"),
    "norm": ({"norm": True}, "projector.norm: found true"),
    "deep_projector": ({"projector": "mlp3x_gelu"}, "projector type 'mlp3x_gelu'"),
    "tower": ({"tower": TIMM}, "the tower test_vit2 is neither CLIP's nor SigLIP's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_there_says_why(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = REFUSED[case]
    saved(tmp_path / "ours", **options)
    assert main(["export", str(tmp_path / "ours"), "--to", "llava-hf", "--out", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'ours'}: ")
    assert re.search(message, error)
    assert not (tmp_path / "hf").exists()


def test_out_and_in_again_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "ours", moe={"language": {"router": "softmax"}})
    assert main(["export", str(tmp_path / "ours"), "--to", "llava-hf", "--out", str(tmp_path / "hf")]) == 0
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "again")]) == 0
    (model, processor), (again, its) = (load_checkpoint(tmp_path / name) for name in ("ours", "again"))
    inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    theirs = its(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=2e-5)
    question = [{"role": "user", "content": "how many ?"}]
    prompts = [p.apply_chat_template(question, add_generation_prompt=True) for p in (processor, its)]
    assert prompts[0] == prompts[1]
