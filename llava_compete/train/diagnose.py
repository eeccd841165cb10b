"""Which layer a non-finite step began in, where no mixture of experts has told: the step, run again.

Called by `callbacks.StepCallback` after a bad step, on all ranks (a part under ZeRO-3 is gathered by all or none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    hooks = [
        part.register_forward_hook(_noting(name, found)) for name, part in module.named_modules() if _is_leaf(part)
    ]
    try:
        for batch in batches:
            run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[:1]


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
        hooks = [
            part.register_forward_hook(_keeping(name, outputs))
            for name, part in module.named_modules()
            if _is_leaf(part)
        ]
        try:
            loss = run(batch)
        finally:
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
        for (name, _), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                found.append(name)
                break
    return found[:1]


def _keeping(name: str, outputs: list[tuple[str, Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs.append((name, output))

    return keep


def _is_leaf(part: nn.Module) -> bool:
    return next(part.children(), None) is None


def _noting(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            found.append(name)

    return note
