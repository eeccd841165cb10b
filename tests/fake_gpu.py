"""Tensors of a GPU that is not there: shapes and devices without memory. What reads a value on the host raises, for
there is none to read: `.item()`, `.tolist()`, `nonzero`, selection by a mask; `fake_gpu` adds the operators that hide
such a read. A backward pass through autograd's engine would look for the device, so `backward` walks its graph in
Python and calls the same nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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
    with (
        FakeTensorMode(),
        _RefuseHiddenReads(),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_apply)),
    ):
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
    for variable, grad in _gradients(root, torch.ones_like(root)).items():
        variable.grad = grad


_plain_apply = next(kind.__dict__["apply"] for kind in torch.autograd.Function.__mro__ if "apply" in kind.__dict__)


def _apply(cls: Any, *arguments: Any) -> Any:
    """Notes which arguments are tensors: a node has an edge for each of these, its backward returns one for all."""
    result = _plain_apply.__get__(None, cls)(*arguments)
    for output in result if isinstance(result, tuple) else (result,):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.takes_tensor = [isinstance(argument, Tensor) for argument in arguments]
    return result


def _grad(output: Tensor, variable: Tensor, grad_output: Tensor) -> tuple[Tensor]:
    """In place of torch.autograd.grad, which takes the engine; `variable` is a leaf."""
    return (_gradients(output, grad_output)[variable],)


def _gradients(root: Tensor, grad_root: Tensor) -> dict[Tensor, Tensor]:
    """By leaf."""
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[root.grad_fn][root.output_nr] = grad_root
    leaves: dict[Tensor, Tensor] = {}
    for node in _nodes_in_order(root.grad_fn):
        arrived = grads.pop(node, {})
        if not arrived:
            continue
        if hasattr(node, "variable"):
            leaves[node.variable] = arrived[0]
            continue
        with torch.no_grad():
            made = _call(node, arrived)
        for (following, index), grad in zip(node.next_functions, made, strict=True):
            if following is None or grad is None:
                continue
            grad = _as_expected(grad, following, index)
            before = grads[following].get(index)
            grads[following][index] = grad if before is None else before + grad
    return leaves


def _call(node: Any, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    metadata = node._input_metadata
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # the engine would fill in zeros
        inputs = [arrived.get(i, torch.empty(m.shape, dtype=m.dtype, device=m.device)) for i, m in enumerate(metadata)]
        made = node.apply(*inputs)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(grad for grad, is_tensor in zip(made, node.takes_tensor, strict=True) if is_tensor)
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
