"""Dispatch modes that count operators and refuse sums over repeated rows, in forward and backward alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Nothing runs on a device for these; the last two are questions that only fake tensors are asked.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_reshape_alias"}
FREE |= {"_unsafe_view", "squeeze_", "device", "promote_types"}


class RepeatedRowsError(AssertionError):
    """A scatter adds to one place more than once."""


class OperatorCounts(TorchDispatchMode):
    """`counts` of operators by name, those that only make a view or allocate left out; of fake tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if not (func.is_view or name in FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Operators(OperatorCounts):
    """Also raises at an `index_put_` that accumulates, an `index_add_` or a `scatter_add_` whose places repeat: on a
    GPU it would serialise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if _adds_to_a_place_twice(name.strip("_").removesuffix("_impl"), args, kwargs or {}):
            raise RepeatedRowsError(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def _adds_to_a_place_twice(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("index_put", "unsafe_index_put"):
        accumulates = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
        indices = torch.broadcast_tensors(*(index for index in args[1] if index is not None))
        return accumulates and _repeat(torch.stack(indices).flatten(1))
    if name in ("index_add", "index_reduce"):
        return _repeat(args[2].reshape(1, -1))
    if name in ("scatter_add", "scatter_reduce"):
        columns = args[2].movedim(args[1], 0).flatten(1) if args[2].ndim > 1 else args[2][:, None]
        return any(_repeat(column[None]) for column in columns.unbind(1))
    return name in ("embedding_dense_backward", "embedding_bag_dense_backward")


def _repeat(places_DP: Tensor) -> bool:
    """Whether two of P places with D coordinates are the same."""
    return torch.unique(places_DP, dim=1).shape[1] < places_DP.shape[1]
