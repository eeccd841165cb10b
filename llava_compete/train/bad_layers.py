"""Which layer a non-finite step began in, where no mixture of experts has told: the step, run again.

Called by `callbacks.StepCallback` after a bad step, on all ranks (a part under ZeRO-3 is gathered by all or none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_bad_layer(module: nn.Module, run: Callable[[Any], Any], batches: Sequence[Any]) -> list[str]:
    """Name of the first module of `module`, in order of running, whose output is not finite; [] if all are.

    Args:
        run: one forward of `module` on one of `batches`.
    """
    found: list[str] = []

    def note(name: str, output: Tensor) -> None:
        if not found and not bool(torch.isfinite(output).all()):
            found.append(name)

    with _each_layers_output(module, note):
        for batch in batches:
            run(batch)
    return found


def first_bad_gradient(module: nn.Module, run: Callable[[Any], Tensor], batches: Sequence[Any]) -> list[str]:
    """Name of the first module of `module`, in order of the backward, with a non-finite gradient at its output, or [].

    No parameter's gradient is touched, and no hook of a gradient reduction runs. Not for ZeRO-3, whose prefetching
    expects whole backward passes.

    Args:
        run: the loss of `module` on one of `batches`.
    """
    found: list[str] = []
    for batch in batches:  # all of them: a rank that left early would keep the others waiting in a reduction
        outputs: list[tuple[str, Tensor]] = []

        def keep(name: str, output: Tensor, outputs: list[tuple[str, Tensor]] = outputs) -> None:
            if output.requires_grad:
                outputs.append((name, output))

        with _each_layers_output(module, keep):
            loss = run(batch)
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (name, _), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                found.append(name)
                break
    return found[:1]


@contextmanager
def _each_layers_output(module: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show `see` the name and output of each module without children, in order of running."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def on_output(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                see(name, output)

        return on_output

    leaves = [(name, part) for name, part in module.named_modules() if next(part.children(), None) is None]
    hooks = [part.register_forward_hook(hook(name)) for name, part in leaves]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
