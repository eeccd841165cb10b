"""Mixtral and Qwen3-MoE come in as text-only checkpoints with experts of ours, and start a model with a tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llava_hf_kit import TEXTS, pictures, randomize
from llava_kit import tokenizer_without_image
from tiny import LANGUAGE, TOWER
from transformers import AutoConfig, AutoModelForCausalLM

from llava_compete.convert.importing import import_checkpoint
from llava_compete.convert.layout import ImportOptions
from llava_compete.errors import UserError
from llava_compete.model.build import build_model
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.section import ModelSection
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig

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
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(block.router.weight.grad.any() for block in moe_blocks(model).values())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_checkpoint(model, processor, tmp_path / "again")
    again, _ = load_checkpoint(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_it_starts_a_model_with_a_tower(tmp_path: Path) -> None:
    theirs = published(tmp_path / "theirs", "mixtral")
    import_checkpoint(tmp_path / "theirs", tmp_path / "language", OPTIONS)
    section = ModelSection.model_validate(
        {"vision_tower": {"config": TOWER}, "language_model": {"name": str(tmp_path / "language")}}
    )
    moe = MoeConfig.model_validate({"language": {"router": "softmax", "balance_coef": 0.5}})
    model, processor = build_model(section, moe, seed=0)
    blocks = moe_blocks(model)
    assert all(block.state is model.routing and block.config.balance_coef == 0.5 for block in blocks.values())
    text = processor(text=["the circle is red"], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**text).logits
        torch.testing.assert_close(model.eval()(**text).logits[..., : expected.shape[-1]], expected, rtol=0, atol=2e-5)
    inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    output = model.train()(**inputs, labels=inputs["input_ids"])
    assert output.aux_losses["language"] > 0
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_checkpoint(model, processor, tmp_path / "again")
    again, _ = load_checkpoint(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    with pytest.raises(UserError, match="has a vision tower; give it as"):
        build_model(ModelSection.model_validate({"language_model": {"name": str(tmp_path / "again")}}), None, seed=0)


def test_weights_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "theirs", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(UserError, match="norm_topk_prob: found false, expected true"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours", OPTIONS)
