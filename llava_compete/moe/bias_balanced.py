"""Loss-free balancing (arXiv 2408.15664): a bias steers the choice towards experts with little load, no loss does.

Experts are chosen by p + b and weighted by p alone, renormalised over the K. After each optimizer step
b += u * sign(mean load - load), with the loads of all K choices on all ranks. Suffixes as in routers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_compete.moe.routers import Routing, SoftmaxRouter, top_experts

UPDATE_RATE = 0.001  # the paper's u


class BiasBalancedRouter(SoftmaxRouter):
    """The softmax router with a bias on the choice; its balance loss is off by default.

    `bias_steps` holds b / u, a whole number: `module.bfloat16()` would round a floating-point buffer, and steps of
    0.001 would be lost.
    """

    balance_coef = 0.0
    needs_loads = True
    bias_steps: Tensor  # int32 [E]

    def make_parameters(self, hidden_size: int) -> None:
        super().make_parameters(hidden_size)
        self.register_buffer("bias_steps", torch.zeros(self.num_routed, dtype=torch.int32))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        nn.init.zeros_(self.bias_steps)

    @property
    def bias_E(self) -> Tensor:
        """b, float32."""
        return UPDATE_RATE * self.bias_steps.float()

    def route(self, logits_TR: Tensor) -> Routing:
        choices_TC = top_experts(logits_TR.softmax(-1) + self.bias_E, self.num_choices)
        weights_TC = logits_TR.gather(1, choices_TC).softmax(-1)
        return Routing(logits_TR, logits_TR, choices_TC, weights_TC)

    @torch.no_grad()
    def end_step(self, load_E: Tensor) -> None:
        self.bias_steps += torch.sign(load_E.mean() - load_E).to(self.bias_steps.dtype)
