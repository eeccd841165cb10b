"""Tensors of a GPU that is not there: shapes and devices without memory. What reads a value on the host raises, for
there is none to read: `.item()`, `.tolist()`, `nonzero`, selection by a mask; `fake_gpu` adds the operators that hide
such a read. A backward pass through autograd's engine would look for the device, so `backward` walks its graph in
Python and calls the same nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN_READS = {"masked_scatter_backward", "grouped_linear", "grouped_linear_backward", "bincount", "unique"}


class HostReadError(Exception):
    """An operator reads a value of the device."""


class _RefuseHiddenReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        # torch has a grouped kernel for bfloat16 alone, and a loop over offsets on the host for other dtypes.
        if name in HIDDEN_READS or (name == "_grouped_mm" and args[0].dtype != torch.bfloat16):
            raise HostReadError(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors made on "cuda" are fake, and an operator that would wait for them raises."""
    with FakeTensorMode(), _RefuseHiddenReads():
        try:
            yield
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostReadError(str(error)) from error


def move_to_fake_gpu(model: nn.Module) -> None:
    """Replace all parameters and buffers; inside `fake_gpu`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def backward(root: Tensor) -> None:
    """Gradients of the scalar `root` in every leaf's `grad`; inside the `fake_gpu` that made it."""
    order = _nodes_in_order(root.grad_fn)
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[root.grad_fn][0] = torch.ones_like(root)
    for node in order:
        arrived = grads.pop(node, {})
        if hasattr(node, "variable"):  # a leaf
            if arrived:
                node.variable.grad = arrived[0]
            continue
        if not arrived:
            continue
        with torch.no_grad():
            made = _call(node, arrived)
        for (following, index), grad in zip(node.next_functions, made, strict=False):
            if following is None or grad is None:
                continue
            grad = _as_expected(grad, following, index)
            before = grads[following].get(index)
            grads[following][index] = grad if before is None else before + grad


def _call(node: Any, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    metadata = node._input_metadata
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # the engine would fill in zeros
        inputs = [arrived.get(i, torch.zeros(m.shape, dtype=m.dtype, device=m.device)) for i, m in enumerate(metadata)]
        made = node.apply(*inputs)
    else:
        made = node(*(arrived.get(i) for i in range(len(metadata))))
    return made if isinstance(made, tuple) else (made,)


def _as_expected(grad: Tensor, node: Any, index: int) -> Tensor:
    """Broadcast dimensions summed and dtypes matched, as the engine does between two nodes."""
    expected = node.variable if hasattr(node, "variable") else node._input_metadata[index]
    assert grad.device == expected.device, f"{node}: a gradient on {grad.device}, expected {expected.device}"
    return grad.sum_to_size(expected.shape).to(expected.dtype)


def _nodes_in_order(root: Any) -> list[Any]:
    """Every node before those that it hands gradients to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return order[::-1]
