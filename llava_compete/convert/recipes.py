"""How a tensor of one checkpoint is made of tensors of another: by name, checked on shapes before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.model.shards import PlannedTensor
from llava_compete.weight_files import StoredTensor


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def rows(*tensors: Tensor) -> Tensor:
    """Tensors under one another."""
    return torch.cat(tensors)


def stacked(*tensors: Tensor) -> Tensor:
    """Tensors along a new first axis, as experts are packed."""
    return torch.stack(tensors)


def part(number: int, count: int, tensor: Tensor) -> Tensor:
    """One of `count` equal groups of rows."""
    return tensor.chunk(count)[number]


class Recipe(NamedTuple):
    """`make` of the tensors called `sources`, in that order."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = same


def third(name: str, number: int) -> Recipe:
    """The number-th third of a tensor's rows: q, k or v of an attention's joined projection."""
    return Recipe((name,), partial(part, number, 3))


def plan_tensors(recipes: Mapping[str, Recipe], stored: Mapping[str, StoredTensor]) -> dict[str, PlannedTensor]:
    """What each recipe gives, from headers alone.

    Raises:
        UserError: a source that is not there, or sources whose shapes do not go together.
    """
    planned = {}
    for target, recipe in recipes.items():
        for name in recipe.sources:
            if name not in stored:
                raise UserError(f"missing tensor {name}, of which {target} is made")
        sources = [stored[name] for name in recipe.sources]
        try:
            result = recipe.make(*[torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources])
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = ", ".join(f"{source.name} {list(source.shape)}" for source in sources)
            raise UserError(f"{target} cannot be made of {shapes}: {' '.join(str(error).split())}") from error
        planned[target] = PlannedTensor(tuple(result.shape), result.dtype, partial(_make, recipe.make, sources))
    return planned


def _make(make: Callable[..., Tensor], sources: list[StoredTensor]) -> Tensor:
    return make(*[source.read() for source in sources]).contiguous()
