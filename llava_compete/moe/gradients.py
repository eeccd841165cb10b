"""How strongly each source moves a layer's routing: sizes of the gradients at its router's logits, of one backward.

The task, the judgement, the distillation, the balance loss and the z loss all reach the logits r. Where a step is to be
measured, each gets a view of r of its own, and the view's backward adds up what passes by; the gradient that goes on is
the same. Nothing is computed twice, and in other steps there are no views. Suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SOURCES = ("task", "judge", "distillation", "balance", "z")


class RouterGradients:
    """Of one optimizer step, summed over its backward passes on the device.

    sums: by (source, layer), [2] in float32: squared gradients [T, E] of the tokens that count, and their number.
    scale: what the step's loss itself was multiplied by (ranks, a loss scaler), by which gradients are too large.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.scale: Tensor | None = None

    @torch.compiler.disable  # its backward writes here
    def view(self, logits_TE: Tensor, source: str, layer: str, counted_T: Tensor | None) -> Tensor:
        """The logits, for this source alone; `counted_T` None in a recomputation, whose views see no backward."""
        return _View.apply(logits_TE, self, (source, layer), counted_T)

    def loss(self, loss: Tensor) -> Tensor:
        """The loss, whose gradient tells the scale."""
        return _Scale.apply(loss, self)

    def roots(self, sums: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """Root mean square over tokens of the gradient's length, by "router_gradient_<source>/<layer>", from `sums` of
        all ranks."""
        scale = 1.0 if self.scale is None else self.scale.abs()
        return {
            f"router_gradient_{source}/{layer}": (squares / tokens.clamp(min=1)).sqrt() / scale
            for (source, layer), (squares, tokens) in sums.items()
        }


class _View(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, into: RouterGradients, key: tuple[str, str], counted_T: Tensor | None
    ) -> Tensor:
        ctx.into, ctx.key, ctx.counted_T = into, key, counted_T
        return logits_TE.view_as(logits_TE)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None, None]:
        counted_T = ctx.counted_T
        squares = torch.dot(grad_TE.float().square().sum(-1), counted_T)
        found = torch.stack([squares, counted_T.sum()])
        sums = ctx.into.sums
        sums[ctx.key] = sums[ctx.key] + found if ctx.key in sums else found
        return grad_TE, None, None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, into: RouterGradients) -> Tensor:
        ctx.into = into
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.into.scale = grad.detach().float()
        return grad, None
