"""The routers: from a token to K chosen experts and their weights. One class each, one line each in router_table.py.

All arithmetic is float32 whatever the model's dtype or autocast; ties go to the lowest expert, and NaN comes first. A
logit of -inf just loses here; the losses show it (`losses.py`). Suffixes: T tokens,
D width, E experts, R routed experts (E, or E-1 with a shared expert), K chosen, C choices that count for the balance.
Sources: X-MoE 2204.09179, perturbed cosine 2405.14131, DeepSeek-V2/V3 2405.04434 and 2412.19437, LibMoE 2411.00918.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_compete.moe.precision import without_autocast

INIT_STD = 0.02
COSINE_TEMPERATURE = 0.3
COSINE_NORM = 1.5
XMOE_EPS = 1e-4
PERTURBATION = 0.1


class Routing(NamedTuple):
    """What a router says of each token; float32, indices int64."""

    logits_TR: Tensor
    scores_TR: Tensor  # what `probs_TR` is the softmax of
    choices_TC: Tensor  # routed experts, best first
    selected_experts_TK: Tensor  # the experts to run: the choices, and the shared expert if there is one
    routing_weights_TK: Tensor  # what multiplies their outputs; sums to 1

    @property
    def probs_TR(self) -> Tensor:
        """The probabilities that the balance loss, entropy and margin read; computed when asked for, so not at
        inference."""
        return self.scores_TR.softmax(-1)


def top_experts(scores_TE: Tensor, count: int) -> Tensor:
    """Indices [T, count] of the largest scores, best first; ties go to the lowest index, NaN comes first."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :count]


class _Direction(torch.autograd.Function):
    """z [T, R] / n, with n = max(|z|, least) + added; in 6 operators backwards where autograd takes 16.

    With u = z / n: dz = (du - u (u · du) n / |z|) / n, without the second term where |z| is below `least`.
    """

    @staticmethod
    def forward(ctx: Any, z_TR: Tensor, least: float, added: float) -> Tensor:
        length_T1 = z_TR.norm(dim=-1, keepdim=True)
        divisor_T1 = length_T1.clamp(min=least) + added
        direction_TR = z_TR / divisor_T1
        ctx.save_for_backward(length_T1, divisor_T1, direction_TR)
        ctx.least = least
        return direction_TR

    @staticmethod
    def backward(ctx: Any, grad_TR: Tensor) -> tuple[Tensor, None, None]:
        length_T1, divisor_T1, direction_TR = ctx.saved_tensors
        along_T1 = (grad_TR * direction_TR).sum(-1, keepdim=True) * divisor_T1
        along_T1 = torch.where(length_T1 > ctx.least, along_T1 / length_T1, 0.0)
        return torch.addcmul(grad_TR, direction_TR, along_T1, value=-1) / divisor_T1, None, None


class Router(nn.Module):
    """Base class: float32 region, parameters, and the renormalised top-K that most routers share.

    Args:
        num_experts, num_experts_per_tok: E and K, a shared expert counted.
        hidden_size: width D of a token.

    A class says what its configuration may be: `even_experts` where E must be even, `num_shared` experts that are
    always on, and `balance_coef`, the default coefficient of its balance loss. Any parameter or buffer is upcycled,
    saved and resumed; a router with `needs_loads` gets `end_step` after each optimizer step.
    """

    even_experts: ClassVar[bool] = False
    num_shared: ClassVar[int] = 0
    balance_coef: ClassVar[float] = 0.01
    needs_loads: ClassVar[bool] = False

    def __init__(self, num_experts: int, num_experts_per_tok: int, hidden_size: int) -> None:
        super().__init__()
        self.num_routed = num_experts - self.num_shared
        self.num_choices = num_experts_per_tok - self.num_shared
        self.make_parameters(hidden_size)

    def make_parameters(self, hidden_size: int) -> None:
        self.weight = nn.Parameter(torch.empty(self.num_routed, hidden_size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """N(0, 0.02), also after upcycling."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)

    def forward(self, x_TD: Tensor) -> Routing:
        with without_autocast(x_TD.device.type):
            return self.route(self.logits(x_TD.float()))

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight.float())

    def route(self, logits_TR: Tensor) -> Routing:
        raise NotImplementedError

    def end_step(self, load_E: Tensor) -> None:
        """After an optimizer step, with the choices that each expert got in it, on all ranks; needs `needs_loads`."""

    def renormalised(self, logits_TR: Tensor, log_scores_TR: Tensor) -> Routing:
        """Choose the largest scores and weight by them, renormalised over the choices.

        Given as logarithms (up to a constant of the token), for then scores that underflow still differ, and a single
        choice has a weight of exactly 1 and a gradient of exactly 0.
        """
        choices_TC = top_experts(log_scores_TR, self.num_choices)
        weights_TC = log_scores_TR.gather(1, choices_TC).softmax(-1)
        return Routing(logits_TR, logits_TR, choices_TC, choices_TC, weights_TC)


class SoftmaxRouter(Router):
    """p = softmax(W x); the K largest, renormalised. Also the router that competition trains."""

    def route(self, logits_TR: Tensor) -> Routing:
        return self.renormalised(logits_TR, logits_TR)


class SigmoidRouter(Router):
    """Chooses and weights by sigmoid(W x); the balance loss still reads softmax(W x)."""

    def route(self, logits_TR: Tensor) -> Routing:
        return self.renormalised(logits_TR, F.logsigmoid(logits_TR))


class XMoeRouter(Router):
    """Cosine scores in E/2 dimensions against rows of norm 1.5; weights are a softmax over the chosen probabilities."""

    even_experts = True

    def make_parameters(self, hidden_size: int) -> None:
        reduced = self.num_routed // 2
        self.inp_reduction = nn.Parameter(torch.empty(reduced, hidden_size))
        self.expert_embeddings = nn.Parameter(torch.empty(self.num_routed, reduced))

    def logits(self, x_TD: Tensor) -> Tensor:
        reduced_TR = self.direction(F.linear(x_TD, self.inp_reduction.float()))
        # The published code rescales the stored rows in place: the scale takes no part in the gradient.
        embeddings_ER = self.expert_embeddings.float()
        return F.linear(reduced_TR, embeddings_ER * self.row_scale(embeddings_ER.detach()))

    def direction(self, reduced_TR: Tensor) -> Tensor:
        return _Direction.apply(reduced_TR, XMOE_EPS, 0.0)

    def row_scale(self, embeddings_ER: Tensor) -> Tensor:
        return COSINE_NORM / embeddings_ER.norm(dim=-1, keepdim=True)

    def route(self, logits_TR: Tensor) -> Routing:
        scores_TR = logits_TR / COSINE_TEMPERATURE
        probs_TR = scores_TR.softmax(-1)
        choices_TC = top_experts(probs_TR, self.num_choices)
        weights_TC = probs_TR.gather(1, choices_TC).softmax(-1)
        return Routing(logits_TR, scores_TR, choices_TC, choices_TC, weights_TC)


class PerturbedCosineRouter(XMoeRouter):
    """As X-MoE, with 0.1 added to each norm that divides."""

    def direction(self, reduced_TR: Tensor) -> Tensor:
        return _Direction.apply(reduced_TR, 0.0, PERTURBATION)

    def row_scale(self, embeddings_ER: Tensor) -> Tensor:
        return COSINE_NORM / (embeddings_ER.norm(dim=-1, keepdim=True) + PERTURBATION)


class _SharedExpert(Router):
    """The last expert is always on with weight 1/2; the others share the other half among K-1 choices."""

    num_shared = 1

    def renormalised(self, logits_TR: Tensor, log_scores_TR: Tensor) -> Routing:
        routing = super().renormalised(logits_TR, log_scores_TR)
        shared_T1 = torch.full_like(routing.choices_TC[:, :1], self.num_routed)
        half_T1 = torch.full_like(logits_TR[:, :1], 0.5)
        return routing._replace(
            selected_experts_TK=torch.cat([routing.choices_TC, shared_T1], dim=1),
            routing_weights_TK=torch.cat([0.5 * routing.routing_weights_TK, half_T1], dim=1),
        )


class SharedSoftmaxRouter(_SharedExpert, SoftmaxRouter):
    """SharedE-V2: the softmax router beside a shared expert."""


class SharedSigmoidRouter(_SharedExpert, SigmoidRouter):
    """SharedE-V3: the sigmoid router beside a shared expert."""
