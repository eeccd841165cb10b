"""Tensors in files that others wrote: safetensors, and pickles by torch's safe unpickler alone; whole or in shards.

Headers are read first and tensors one by one, so that memory stays near the largest of them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.files import read_json

# What transformers, peft and torch users call the weights of a directory; the first that is there is taken, as by
# transformers. An index stands for its shards.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class StoredTensor(NamedTuple):
    """A tensor in a file, of which only the header has been read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor itself, in memory of its own."""
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, framework="pt") as file:
                return file.get_tensor(self.name)
        return _pickled(self.file, self.file.stat().st_mtime_ns)[self.name].clone(memory_format=torch.contiguous_format)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights, by transformers' names; empty if there are none.

    Raises:
        UserError: a broken index, or a shard that it lists and that is not there.
    """
    found = next((directory / name for name in NAMES if (directory / name).is_file()), None)
    if found is None:
        return []
    return _shards(found) if found.name.endswith(".index.json") else [found]


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{index}: has no 'weight_map', expected an index of shards")
    files = [index.parent / shard for shard in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, though {index.name} lists it")
    return files


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by its name.

    Raises:
        UserError: a truncated or damaged file, or a pickle that holds more than weights.
    """
    if file.suffix != ".safetensors":
        tensors = _pickled(file, file.stat().st_mtime_ns)
        return {name: StoredTensor(file, name, tuple(t.shape), t.dtype) for name, t in tensors.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
            # An empty slice has the dtype as torch knows it.
            return {
                name: StoredTensor(
                    file, name, tuple(part.get_shape()), (part[:0] if part.get_shape() else part[...]).dtype
                )
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged weights ({error})") from error


def load_pickled(file: Path) -> dict[str, Any]:
    """The content of a pickle of weights, its tensors mapped from the file where its format allows it.

    Raises:
        UserError: a damaged file, or one that holds more than weights, such as code.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{file}: not a file of weights alone, and running code out of it is not safe; use safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError) as error:
        line = " ".join(str(error).split())
        if "TorchScript" in line:
            raise UserError(f"{file}: a TorchScript archive, which holds code; use safetensors") from error
        raise UserError(f"{file}: truncated or damaged weights ({line})") from error


@lru_cache(maxsize=4)
def _pickled(file: Path, _: int) -> dict[str, Tensor]:
    """The tensors of a pickle by name; the second argument is when it was written, so that no old content is given."""
    content = load_pickled(file)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file}: expected tensors by name")
    return content
