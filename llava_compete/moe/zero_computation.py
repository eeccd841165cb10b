"""MoE++ (arXiv 2410.07348): beside E experts a token may choose two constants, a copy of itself, or nothing.

As the published code has it (SkyworkAI/MoE-plus-plus, moe_plus_plus_layer.py) in slots E to E+3: v_j mixed with the
token, a_0 x + a_1 v_j with a = softmax(W_j x); the token x; zero. Gating residuals: a router adds a linear map of the
logits of the layer before, of the same part; they are 0 for the first. Weights are the softmax over the K chosen
slots, zero's too, as in LibMoE v2 (the published code leaves zero's out of the sum). Balance: E' x sum over all E'
slots of eta x share x mean probability, eta = 1 for an expert and tau for the others, so that these are used more (the
paper's equation 7). Its table 3 tries tau from 0.1 to 1 and trains the largest model with 0.75; the published code has
no loss. There is no capacity (equation 8), so none is dropped. Where experts change the width nothing can be copied,
and the router has experts alone, as LibMoE does it.

LibMoE v2 (vision_language_model/moe_model/model/moe/moe_plus_plus.py) has less of it: one constant, zero and no copy,
no residual, and in place of tau a factor of 1.3 on slot 4, zero where E = 4; its language models (language_modeling/
layers/moe_layer_plus_plus.py) one zero, one copy, six constants, and neither tau nor residual. Suffixes as in
routers.py; J constants, O = D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_compete.moe.precision import float32_linear, without_autocast
from llava_compete.moe.routers import INIT_STD, Routing, SoftmaxRouter
from llava_compete.moe.slots import Slots

CONSTANTS = 2
TAU = 0.75
CONSTANT_STD = 0.002  # LibMoE's, for a model that is upcycled; the paper draws them at 1


class ZeroComputationExperts(nn.Module):
    """What the slots after the E experts give: no product of a token with a matrix of its width, and no dispatch.

    forward: x [T, D], all chosen slots [T, C] and their weights [T, C] -> [T, D] in the dtype of x.
    """

    def __init__(self, slots: Slots, hidden_size: int) -> None:
        super().__init__()
        self.slots = slots
        self.constants = nn.Parameter(torch.empty(CONSTANTS, hidden_size))
        self.gates = nn.Parameter(torch.empty(CONSTANTS, 2, hidden_size))

    def forward(self, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor) -> Tensor:
        with without_autocast(x_TD.device.type):
            weights_TR = weights_TC.new_zeros(len(x_TD), self.slots.total).scatter(1, choices_TC, weights_TC)
            experts = self.slots.num_experts
            copy_T1 = weights_TR[:, experts + CONSTANTS : experts + CONSTANTS + 1]
            shares_TJ2 = float32_linear(x_TD, self.gates.flatten(0, 1)).unflatten(1, (CONSTANTS, 2)).softmax(-1)
            shares_TJ2 = shares_TJ2 * weights_TR[:, experts : experts + CONSTANTS, None]
            of_token_TJ, of_constant_TJ = shares_TJ2.unbind(2)
            kept_T1 = copy_T1 + of_token_TJ.sum(1, keepdim=True)
            # Float32 times the token as it is: of a wider copy autograd would keep the copy.
            return torch.addcmul(of_constant_TJ @ self.constants.float(), kept_T1, x_TD)


class ZeroComputationRouter(SoftmaxRouter):
    """MoE++. An upcycled model does not answer as its dense parent: a token that is copied, replaced or dropped has the
    less of its experts."""

    keeps_dense_answers = False
    has_residual = True

    @classmethod
    def make_slots(cls, num_experts: int, num_experts_per_tok: int, keeps_width: bool) -> Slots:
        return Slots(num_experts, idle=CONSTANTS + 2 if keeps_width else 0)

    def make_parameters(self, hidden_size: int) -> None:
        super().make_parameters(hidden_size)
        self.residual = nn.Parameter(torch.empty(self.num_routed, self.num_routed))
        if self.slots.idle:
            self.free_experts = ZeroComputationExperts(self.slots, hidden_size)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if isinstance(self.free_experts, ZeroComputationExperts):
            with torch.no_grad():
                self.free_experts.constants.mul_(CONSTANT_STD / INIT_STD)

    def forward(self, x_TD: Tensor, before_TR: Tensor | None = None) -> Routing:
        """`before_TR`: the logits of the layer before."""
        with without_autocast(x_TD.device.type):
            logits_TR = self.logits(x_TD)
            before_TR = torch.zeros_like(logits_TR) if before_TR is None else before_TR.to(logits_TR.device)
            # For the first layer too: a parameter that some forward leaves out has no gradient to reduce.
            return self.with_rows(self.route(torch.addmm(logits_TR, before_TR, self.residual.float().t())))

    @classmethod
    def balance_of(cls, slots: Slots, scores_TLR: Tensor, shares_SLR: Tensor) -> tuple[Tensor, Tensor]:
        shares_SLR[..., slots.num_experts :] *= TAU
        return scores_TLR, shares_SLR
