"""Which of a directory's files hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_compete.weight_files import weight_files


def test_the_files_are_those_that_transformers_takes(tmp_path: Path) -> None:
    """A download of safetensors and of all JSON files brings the index of shards that it left out."""
    shard = "pytorch_model-00001-of-00001.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / shard).touch()
    assert weight_files(tmp_path) == [tmp_path / shard]
    (tmp_path / "pytorch_model.bin").touch()
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
