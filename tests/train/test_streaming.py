"""Directories that are written tensor by tensor against those that are written whole.

Of several ranks: test_expert_parallel.py, and with adapters test_stage_launch.py (slow).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn

from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.lora import load_adapter
from llava_compete.model.unread import load_unread
from llava_compete.parts import Part
from llava_compete.train import trainable
from llava_compete.train.adapters import ADAPTER_DIR, save_merged, with_adapters
from llava_compete.train.config import PartTraining
from llava_compete.train.streaming import stream_checkpoint, stream_trained

MODES: dict[Part, PartTraining] = {
    "vision": PartTraining(mode="lora"),
    "projector": PartTraining(mode="full"),
    "language": PartTraining(mode="lora"),
}


@pytest.mark.parametrize("tied", [False, True])
def test_files_are_those_of_a_whole_save(tmp_path: Path, tied: bool) -> None:
    model, processor = tiny_model(moe={"language": {"router": "bias_balanced"}}, language={"tie_word_embeddings": tied})
    whole, streamed = tmp_path / "whole" / "model", tmp_path / "streamed" / "model"
    save_checkpoint(model, processor, whole)
    stream_checkpoint(model, processor, streamed)
    assert {path.name for path in whole.iterdir()} == {path.name for path in streamed.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name


def test_a_shard_at_a_time(tmp_path: Path) -> None:
    model, processor = tiny_model(moe={"language": {}})
    stream_checkpoint(model, processor, tmp_path, shard_bytes=2**16)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert all(sum(t.nbytes for t in load_file(path).values()) <= max(2**16, largest) for path in shards)
    again, _ = load_checkpoint(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["experts", "dense and tied"])
def test_merged_layer_by_layer_it_is_peft_s_merged_model(tmp_path: Path, kind: str) -> None:
    """Adapters on attention, linear layers and packed experts, and a part that trained in full; shards cut layers."""
    tied = kind != "experts"
    moe = None if tied else {"vision": {}, "projector": {}, "language": {"router": "bias_balanced"}}
    plain, processor = tiny_model(moe=moe, language={"tie_word_embeddings": tied})
    base, out = tmp_path / "base", tmp_path / "out"
    save_checkpoint(plain, processor, base)
    wrapped = with_adapters(load_checkpoint(base)[0], MODES)
    trainable.apply(wrapped, MODES)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    stream_trained(wrapped, trained, out / ADAPTER_DIR, shard_bytes=2**14)
    unread = load_unread(base, torch.float32)
    assert unread is not None
    save_merged(unread[0], MODES, processor, out, shard_bytes=2**14)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert len(list((out / ADAPTER_DIR).glob("trained-*.safetensors"))) > 1
    expected = wrapped.merge_and_unload().state_dict()
    merged = load_checkpoint(out)[0].state_dict()
    again = load_adapter(load_checkpoint(base)[0], out / ADAPTER_DIR).merge_and_unload().state_dict()
    assert expected.keys() == merged.keys() == again.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
        assert torch.equal(again[name], tensor), name
