"""A model whose experts choose themselves: upcycling exactly or not, training, adapters, decoding, servers, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_kit import logits_after_two_steps
from safetensors.torch import load_file
from test_forward import batch, picture
from tiny import tiny_model

from llava_compete.errors import UserError
from llava_compete.evaluation.layer_worth import measure_likeness
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.lora import LoraSettings, add_adapters, merge_adapters
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.train import trainable
from llava_compete.train.config import PartTraining
from llava_compete.train.streaming import stream_trained

AUTONOMY = {"router": "autonomy"}
EVERYWHERE = dict.fromkeys(("vision", "projector", "language"), AUTONOMY)


def inputs_of(processor: Any) -> Any:
    return batch(processor, ["a <image> red", "how many shapes"], [picture()])


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    save_checkpoint(*tiny_model(), tmp_path / "dense")
    return tmp_path / "dense"


def test_a_fused_gate_is_cut_as_one_apart(tmp_path: Path) -> None:
    """Phi's gate and up projections are one tensor."""
    language = {"model_type": "phi3", "pad_token_id": 0, "tie_word_embeddings": False}
    save_checkpoint(*tiny_model(language=language), tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"language": AUTONOMY}))
    (parent, processor), (model, _) = load_checkpoint(tmp_path / "dense"), load_checkpoint(tmp_path / "moe")
    inputs = inputs_of(processor)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, parent(**inputs).logits, rtol=0, atol=1e-5)


def test_experts_prefer_other_tokens_from_the_start(dense: Path, tmp_path: Path) -> None:
    """Equal norms would send all tokens to the first experts for ever."""
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({"language": AUTONOMY}))
    model, processor = load_checkpoint(tmp_path / "moe")
    model(**inputs_of(processor), output_routing=True)
    for record in model.routing.records.values():
        assert (record.metrics.load_E > 0).sum() >= 3


def test_below_full_rank_it_says_by_how_much_it_misses(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moe = MoeConfig.model_validate({"language": {**AUTONOMY, "autonomy_rank": 8}})
    report = upcycle(dense, tmp_path / "moe", moe)
    assert "moe.language: at autonomy_rank 8 of 32 the result does not answer as its parent" in caplog.text
    values = torch.linalg.svdvals(
        load_file(dense / "model.safetensors")["model.language_model.layers.0.mlp.gate_proj.weight"].double()
    )
    cut = float(values[8:].norm() / values.norm())
    assert f"language.0: the first projection at rank 8: relative error {cut:.3g}" in caplog.text
    with pytest.raises(UserError, match=r"moe\.language\.autonomy_rank: found 33, expected at most 32"):
        upcycle(dense, tmp_path / "no", MoeConfig.model_validate({"language": {**AUTONOMY, "autonomy_rank": 33}}))
    (layer, _) = report.layers
    lower, rest = 8 * 32, 48 * 8 + 2 * 48 * 32
    assert (layer.dense, layer.total, layer.active) == (3 * 48 * 32, 4 * (lower + rest), 4 * lower + 2 * rest)
    with pytest.raises(UserError, match=r"moe\.language\.autonomy_rank: found 4, the checkpoint has 8"):
        trained_with(tmp_path / "moe", {**AUTONOMY, "autonomy_rank": 4})


def trained_with(checkpoint: Path, layer: dict[str, Any]) -> None:
    from llava_compete.model.build import build_model
    from llava_compete.model.section import ModelSection

    section = ModelSection.model_validate({"checkpoint": str(checkpoint)})
    build_model(section, MoeConfig.model_validate({"language": layer}), seed=0)


def test_it_trains_is_saved_and_decodes_with_a_cache(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate(EVERYWHERE))
    model, processor = load_checkpoint(tmp_path / "moe")
    inputs = inputs_of(processor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    save_checkpoint(model.eval(), processor, tmp_path / "trained")
    again, _ = load_checkpoint(tmp_path / "trained")
    question = {key: value for key, value in inputs.items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(again(**question).logits, model(**question).logits, rtol=0, atol=1e-6)
        written = [
            again.generate(**question, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache)
            for use_cache in (False, True)
        ]
    assert torch.equal(*written)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's remarks on tied embeddings and torch's attention
def test_adapters_on_its_experts_and_its_lower_half_in_full(tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(moe={"language": {**AUTONOMY, "autonomy_rank": 8}}), tmp_path / "base")
    model, processor = load_checkpoint(tmp_path / "base")
    adapted = add_adapters(model, {"language": LoraSettings(rank=2, alpha=4)}).train()
    trainable.apply(adapted, {"language": PartTraining(mode="lora")})
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    # Of two layers three projections each, which peft wraps one around the other.
    assert sum("experts" in name and "lora_A" in name for name in names) == 2 * 3
    assert sum("low_proj" in name for name in names) == 2
    inputs = inputs_of(processor)
    learned = logits_after_two_steps(adapted, inputs, learning_rate=1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    stream_trained(adapted, names, tmp_path / "adapter")
    merge_adapters(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_checkpoint(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, learned, rtol=0, atol=1e-5)


def test_experts_of_one_parent_are_alike_however_they_are_cut(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({"language": AUTONOMY}))
    model, processor = load_checkpoint(tmp_path / "moe")
    inputs = {**inputs_of(processor)}
    for likeness in measure_likeness(model, inputs).values():
        assert likeness.weights == pytest.approx(1, abs=1e-4)
        assert likeness.outputs == pytest.approx(1, abs=1e-4)


def test_servers_and_transformers_are_not_offered_what_they_compute_otherwise(dense: Path, tmp_path: Path) -> None:
    from llava_compete.cli import main

    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({"language": AUTONOMY}))
    model, _ = load_checkpoint(tmp_path / "moe")
    assert getattr(model.config.text_config, "moe_intermediate_size", None) is None
    assert len(moe_blocks(model)) == 2
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["moe"]["language"]["router"] == "autonomy"
    assert main(["export", str(tmp_path / "moe"), "--to", "llava-hf", "--out", str(tmp_path / "out")]) == 2
