"""A dispatch mode that counts operators and refuses sums over repeated rows, in forward and backward alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Nothing runs on a device for these.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_reshape_alias"}


class Operators(TorchDispatchMode):
    """`counts` of operators by name, those that only make a view or allocate left out.

    An `index_put_` that accumulates, an `index_add_` or a `scatter_add_` of rows that repeat raises: on a GPU it would
    serialise. So does one whose rows do not repeat in this run only because there is a single row, which no test wants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        self._check(name, args, kwargs)
        result = func(*args, **kwargs)
        if not (func.is_view or name in FREE):
            self.counts[name] += 1
        return result

    def _check(self, name: str, args: Any, kwargs: Any) -> None:
        if name in ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"):
            accumulates = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
            indices = [index for index in args[1] if index is not None]
            if accumulates and indices:
                assert not _repeats(torch.stack(torch.broadcast_tensors(*indices)).flatten(1).t()), f"{name}: repeats"
        elif name in ("index_add", "index_add_", "index_reduce", "index_reduce_"):
            assert not _repeats(args[2][:, None]), f"{name}: rows repeat"
        elif name in ("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"):
            columns = args[2].movedim(args[1], 0).flatten(1).t() if args[2].ndim > 1 else args[2][None]
            assert not any(_repeats(column[:, None]) for column in columns), f"{name}: rows repeat"
        elif name in ("embedding_dense_backward", "_embedding_bag_dense_backward", "bincount", "repeat_interleave"):
            raise AssertionError(f"{name}: sums over repeated rows, or waits to count them")


def _repeats(rows: Tensor) -> bool:
    return len(torch.unique(rows, dim=0)) < len(rows)
