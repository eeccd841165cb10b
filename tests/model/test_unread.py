"""A model whose weights are left in their files, against a plain load of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor, nn
from tower_kit import ROTARY

from llava_compete.model import checkpoint
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.checkpoint import read_weight_headers
from llava_compete.model.lora import LoraSettings, add_adapters
from llava_compete.model.unread import load_unread

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"moe": dict.fromkeys(("vision", "projector", "language"), EXPERTS)},
    "buffers": {"moe": {"language": {**EXPERTS, "router": "bias_balanced"}}},
    "tied": {"language": {"tie_word_embeddings": True}},
    "text": {"tower": None},
    "rotary": {"tower": ROTARY},
}


def read(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, once every weight has been read."""
    for parameter in model.parameters():
        if hasattr(parameter, "stored"):
            assert parameter.isnan().all()
            parameter.data = parameter.stored.whole().to(parameter.dtype)
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_read_later_it_is_the_loaded_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(**KINDS[kind]), tmp_path)
    plain, _ = load_checkpoint(tmp_path, dtype=dtype)
    found = load_unread(tmp_path, dtype)
    assert found is not None
    model, expected = found[0], {**plain.state_dict(), **dict(plain.named_buffers())}
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) < 1024
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    values = read(model)
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert values[name].dtype == tensor.dtype, name
        assert torch.equal(values[name], tensor), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "tied")


def test_adapters_around_it_start_as_elsewhere(tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(**KINDS["experts"]), tmp_path)
    models = []
    for load in (load_checkpoint, load_unread):
        torch.manual_seed(0)
        found = load(tmp_path, dtype=torch.float32)
        assert found is not None
        models.append(add_adapters(found[0], {"vision": LoraSettings(), "language": LoraSettings()}))
    plain, later = models
    values = read(later)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(values[name], tensor), name


@pytest.mark.parametrize("chunk", [1, 30, 2**20])
def test_any_part_of_a_tensor(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    tensors = {"a": torch.randn(5, 3, 2), "b": torch.randn(7), "c": torch.tensor(2.0), "d": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    headers = read_weight_headers(tmp_path)
    for name, tensor in tensors.items():
        flat = tensor.flatten()
        assert torch.equal(headers[name].whole(), tensor)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                found = torch.empty(stop - start)
                headers[name].copy_flat(found, start)
                assert torch.equal(found, flat[start:stop]), (name, start, stop)


def test_what_is_stored_in_another_form_is_left_to_the_plain_load(tmp_path: Path) -> None:
    """A tied tensor that is stored twice; transformers compares the two."""
    save_checkpoint(*tiny_model(**KINDS["tied"]), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert load_unread(tmp_path, torch.float32) is None
