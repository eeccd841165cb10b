"""TC-MoE, ternary choice (Yan et al., ICLR 2025): each expert may be added, subtracted or left out.

As LibMoE v2 defines it (moe_model/model/moe/moe_tcmoe.py), which is the published TCMoEBlock with its signs: a linear
router over 2E + K slots, E experts, the same with a minus, and K that run nothing ("null"). 1 is taken from the logits
of the subtracted, 10 from those of the null ones; the K largest of the softmax p are chosen, and weighted by p over the
sum of p of the chosen experts and of all null slots. LibMoE's balance loss lets each sequence of a batch count the
choices of all its sequences, and is 1/E where routing is even; here each counts its own, and it is 1, as with the other
routers. Suffixes as in routers.py.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llava_compete.moe.routers import Router, Routing, top_experts
from llava_compete.moe.slots import Slots

SUBTRACTED_BIAS, NULL_BIAS = -1.0, -10.0


class TernaryRouter(Router):
    """An upcycled model does not answer as its dense parent: where an expert is subtracted, what remains is less than
    one dense answer; else all but about K e^-10 of it remains."""

    extra_coefs: ClassVar[dict[str, float]] = {"null_reward_coef": 1e-5}
    keeps_dense_answers = False

    @classmethod
    def make_slots(cls, num_experts: int, num_experts_per_tok: int, keeps_width: bool) -> Slots:
        return Slots(num_experts, negated=True, idle=num_experts_per_tok)

    def route(self, logits_TR: Tensor) -> Routing:
        experts = self.slots.num_experts
        added, subtracted, null = logits_TR.split([experts, experts, self.slots.idle], -1)
        scores_TR = torch.cat([added, subtracted + SUBTRACTED_BIAS, null + NULL_BIAS], -1)
        choices_TC = top_experts(scores_TR, self.num_choices)
        chosen_TC = scores_TR.gather(1, choices_TC)
        experts_TC = chosen_TC.masked_fill(choices_TC >= self.slots.first_idle, -torch.inf)
        whole_T1 = torch.cat([experts_TC, scores_TR[:, self.slots.first_idle :]], -1).logsumexp(-1, keepdim=True)
        return Routing(logits_TR, scores_TR, choices_TC, (chosen_TC - whole_T1).exp())

    @classmethod
    def balance_of(cls, slots: Slots, scores_TLR: Tensor, shares_SLR: Tensor) -> tuple[Tensor, Tensor]:
        """Of experts: p of both signs over that of all experts, and shares of the choices that are an expert's."""
        experts = slots.num_experts
        scores_TLE = torch.logaddexp(scores_TLR[..., :experts], scores_TLR[..., experts : slots.first_idle])
        shares_SLE = shares_SLR[..., :experts] + shares_SLR[..., experts : slots.first_idle]
        whole_SL1 = shares_SLE.sum(-1, keepdim=True).clamp(min=1e-12)
        return scores_TLE, shares_SLE * (experts / whole_SL1)

    @classmethod
    def extra_losses(cls, slots: Slots, scores_TLR: Tensor) -> dict[str, Tensor]:
        """Minus the probability of all null slots: a reward for arithmetic that is left out."""
        return {"null_reward_loss": -scores_TLR.softmax(-1)[..., slots.first_idle :].sum(-1)}
