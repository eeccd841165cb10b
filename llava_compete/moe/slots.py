"""What a router chooses among: usually its experts, one slot each.

Suffixes: T tokens, C choices, E experts, R slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Slots 0 to E-1 are the experts. With `negated`, slots E to 2E-1 are the same experts again, whose output is
    subtracted. The last `idle` slots run no expert."""

    num_experts: int
    negated: bool = False
    idle: int = 0

    @property
    def first_idle(self) -> int:
        return self.num_experts * (2 if self.negated else 1)

    @property
    def total(self) -> int:
        return self.first_idle + self.idle

    def runs(self, slots_TC: Tensor, weights_TC: Tensor) -> tuple[Tensor, Tensor]:
        """The expert that each slot runs, E for none, and what its output is multiplied by (0 for none)."""
        if self.total == self.num_experts:
            return slots_TC, weights_TC
        experts_TC = slots_TC
        if self.negated:
            subtracts_TC = slots_TC >= self.num_experts
            weights_TC = torch.where(subtracts_TC, -weights_TC, weights_TC)
            experts_TC = torch.add(slots_TC, subtracts_TC, alpha=-self.num_experts)
        if not self.idle:
            return experts_TC, weights_TC
        return experts_TC.clamp(max=self.num_experts), weights_TC.masked_fill(slots_TC >= self.first_idle, 0.0)

    def runs_something(self, slots_TC: Tensor, weights_TC: Tensor) -> tuple[Tensor, Tensor]:
        """As `runs`, with an expert for each: one that is multiplied by 0 in place of none."""
        experts_TC, weights_TC = self.runs(slots_TC, weights_TC)
        return experts_TC.clamp(max=self.num_experts - 1) if self.idle else experts_TC, weights_TC

    def gates(self, slots_TC: Tensor, weights_TC: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, E]: what each expert's output is multiplied by for each token."""
        gates_TR = torch.zeros(len(slots_TC), self.total, dtype=dtype, device=slots_TC.device)
        gates_TR = gates_TR.scatter(1, slots_TC, weights_TC.to(dtype))
        gates_TE = gates_TR[:, : self.num_experts]
        return gates_TE - gates_TR[:, self.num_experts : self.first_idle] if self.negated else gates_TE
