"""A model directory that is written tensor by tensor against one that is written whole; ranks: test_expert_parallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model

from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.train.streaming import stream_checkpoint


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
