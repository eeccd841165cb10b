"""AdamW for R runs at once: each has its learning rate and its own clipping. All parameters are views of one buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class RunsAdamW:
    """AdamW with decoupled decay, gradients clipped to norm 1 in each run, warm-up then a cosine down to `floor`.

    Args:
        parameters: [R, ...] each; they become views of one [R, P] buffer.
        rates_R: the learning rates at the top.
        warmup: share of the steps with a linear rise.
        floor: share of the rate that is left at the end.
    """

    betas, decay, eps, clip = (0.9, 0.98), 0.01, 1e-8, 1.0

    def __init__(self, parameters: Sequence[Tensor], rates_R: Tensor, steps: int, warmup: float, floor: float):
        runs = len(rates_R)
        self.rates, self.steps, self.warmup, self.floor = rates_R.tolist(), steps, round(warmup * steps), floor
        self.parameters = list(parameters)
        self.values = torch.cat([parameter.detach().reshape(runs, -1) for parameter in parameters], 1)
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        sizes = [parameter[0].numel() for parameter in parameters]
        for parameter, view_RP in zip(parameters, self.values.split(sizes, 1), strict=True):
            parameter.data = view_RP.view(parameter.shape)
        self.rows = [tensor.unbind(0) for tensor in (self.values, self.first, self.second)]
        self.done = 0
        self.counts = [torch.zeros((), device=self.values.device) for _ in self.rates]

    def share(self, step: int) -> float:
        """Of the rate, at a 0-based step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def step(self) -> None:
        """One step from the parameters' gradients, which are dropped; a parameter without one has a gradient of 0."""
        share = self.share(self.done)
        self.done += 1
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads_RP = torch.cat([grad.reshape(len(self.rates), -1) for grad in grads], 1)
        for parameter in self.parameters:
            parameter.grad = None
        scales = (grads_RP.norm(dim=1) / self.clip).clamp_(min=1.0).unbind(0)
        for run, (rate, scale) in enumerate(zip(self.rates, scales, strict=True)):
            value, first, second = ([rows[run]] for rows in self.rows)
            grad = [grads_RP[run]]
            count = self.counts[run].add_(1)
            torch._fused_adamw_(
                value,
                grad,
                first,
                second,
                [],
                [count],
                lr=rate * share,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=None,
            )
