"""Mixtral and Qwen3-MoE come in as text-only checkpoints with experts of ours, and start a model with a tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llava_hf_kit import randomize
from llava_kit import tokenizer_without_image
from tiny import LANGUAGE
from transformers import AutoConfig, AutoModelForCausalLM

from llava_compete.convert.importing import import_checkpoint
from llava_compete.convert.layout import ImportOptions
from llava_compete.errors import UserError
from llava_compete.model.checkpoint import load_checkpoint
from llava_compete.moe.block import moe_blocks

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 8}
    | {"norm_topk_prob": True, "mlp_only_layers": [0]},
}
OPTIONS = ImportOptions(chat_template="vicuna_v1")


def published(directory: Path, family: str, **options: Any) -> Any:
    tokenizer = tokenizer_without_image()
    values = {**LANGUAGE, "model_type": family, **FAMILIES[family], **options}
    model_type = values.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values, vocab_size=len(tokenizer)))
    randomize(model)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers(family: str, tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs", family)
    report = import_checkpoint(tmp_path / "theirs", tmp_path / "ours", OPTIONS)
    assert report.layout == "language model with experts"
    model, processor = load_checkpoint(tmp_path / "ours")
    assert list(moe_blocks(model)) == (["language.1"] if family == "qwen3_moe" else ["language.0", "language.1"])
    inputs = processor(text=["the circle is red", "user"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits[..., : expected.shape[-1]], expected, rtol=0, atol=2e-5)


def test_weights_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "theirs", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(UserError, match="norm_topk_prob: found false, expected true"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours", OPTIONS)
