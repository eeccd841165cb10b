"""The routers: from a token to K chosen experts and their weights. One class each, one line each in router_table.py.

All arithmetic is float32 whatever the model's dtype or autocast; ties go to the lowest expert, and NaN comes first. A
logit of -inf just loses here; the losses show it (`losses.py`). Suffixes: T tokens,
D width, E experts, R routed slots (E, or E-1 with a shared expert, or more: slots.py), K chosen, C choices that count
for the balance, S sequences, L layers.
Sources: X-MoE 2204.09179, perturbed cosine 2405.14131, DeepSeek-V2/V3 2405.04434 and 2412.19437, LibMoE 2411.00918.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_compete.moe.precision import float32_linear, without_autocast
from llava_compete.moe.slots import Slots

INIT_STD = 0.02
COSINE_TEMPERATURE = 0.3
COSINE_NORM = 1.5
XMOE_EPS = 1e-4
PERTURBATION = 0.1
SHARED_WEIGHT = 0.5


class Routing(NamedTuple):
    """What a router says of each token; float32, indices int64.

    scores_TR: what `probs_TR` is the softmax of. choices_TC: routed experts, best first. weights_TC: theirs, sum 1.
    shared_weight: 0, or how much expert R, which every token runs, weighs in the output; the choices weigh the rest.
    rows_RD: with the coupling loss, in training, each routed expert's row in the space of tokens.
    low_TEH: what every expert has computed of each token already, where experts choose themselves (autonomy.py).
    """

    logits_TR: Tensor
    scores_TR: Tensor
    choices_TC: Tensor
    weights_TC: Tensor
    shared_weight: float = 0.0
    rows_RD: Tensor | None = None
    low_TEH: Tensor | None = None

    @property
    def begun(self) -> dict[str, Tensor]:
        """What the experts are given beside the choice."""
        return {} if self.low_TEH is None else {"low_TEH": self.low_TEH}

    @property
    def selected_experts_TK(self) -> Tensor:
        """All experts to run: the choices, and the shared expert if there is one."""
        return with_shared(self.choices_TC, self.logits_TR.shape[1]) if self.shared_weight else self.choices_TC

    @property
    def routing_weights_TK(self) -> Tensor:
        """What multiplies their outputs; sums to 1."""
        if not self.shared_weight:
            return self.weights_TC
        return with_shared((1 - self.shared_weight) * self.weights_TC, self.shared_weight)

    @property
    def probs_TR(self) -> Tensor:
        """The probabilities that the balance loss, entropy and margin read; computed when asked for, so not at
        inference."""
        return self.scores_TR.softmax(-1)


def with_shared(values_TC: Tensor, value: float) -> Tensor:
    """A further column of one value."""
    return torch.cat([values_TC, torch.full_like(values_TC[:, :1], value)], dim=1)


def top_experts(scores_TE: Tensor, count: int) -> Tensor:
    """Indices [T, count] of the largest scores, best first; ties go to the lowest index, NaN comes first."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :count]


def by_weight(experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and their weights, the largest weight first; equal ones stay in order."""
    weights_TK, order_TK = weights_TK.float().sort(dim=1, descending=True, stable=True)
    return experts_TK.gather(1, order_TK), weights_TK


class _TopWeights(torch.autograd.Function):
    """log scores [T, R] -> `top_experts` and the softmax over their scores [T, C], which the sort has found already."""

    @staticmethod
    def forward(ctx: Any, log_scores_TR: Tensor, count: int) -> tuple[Tensor, Tensor]:
        ordered = torch.sort(log_scores_TR, dim=-1, descending=True, stable=True)
        choices_TC, weights_TC = ordered.indices[:, :count], ordered.values[:, :count].softmax(-1)
        ctx.save_for_backward(choices_TC, weights_TC)
        ctx.num_routed = log_scores_TR.shape[1]
        ctx.mark_non_differentiable(choices_TC)
        return choices_TC, weights_TC

    @staticmethod
    def backward(ctx: Any, _: None, grad_TC: Tensor) -> tuple[Tensor, None]:
        choices_TC, weights_TC = ctx.saved_tensors
        of_chosen_TC = torch._softmax_backward_data(grad_TC, weights_TC, -1, weights_TC.dtype)
        return grad_TC.new_zeros(len(grad_TC), ctx.num_routed).scatter_(1, choices_TC, of_chosen_TC), None


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
        output_size: width of the experts' outputs, default D.
        rank: of the experts' first projection, where the router `factorises` it.

    A class says what its configuration may be: `even_experts` where E must be even, `num_shared` experts that are
    always on, `balance_coef` and `router_z_coef`, the defaults of these coefficients, and `extra_coefs`, those of loss
    terms that it alone has (`extra_losses`). `keeps_dense_answers`: an upcycled model answers as its dense parent. Any
    parameter or buffer is upcycled, saved and resumed; a router with `needs_loads` gets `end_step` after each optimizer
    step, one with `has_residual` the logits of the layer before in its call; the coupling loss reads those that
    `has_rows`. One that `factorises` the experts' first projection has the half of it that every expert computes.
    `free_experts`: what slots that run no expert give, of (x [T, D], choices, weights).
    """

    even_experts: ClassVar[bool] = False
    num_shared: ClassVar[int] = 0
    balance_coef: ClassVar[float] = 0.01
    router_z_coef: ClassVar[float] = 0.001
    extra_coefs: ClassVar[dict[str, float]] = {}
    keeps_dense_answers: ClassVar[bool] = True
    needs_loads: ClassVar[bool] = False
    has_residual: ClassVar[bool] = False
    has_rows: ClassVar[bool] = True
    factorises: ClassVar[bool] = False

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        output_size: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.slots = self.make_slots(num_experts, num_experts_per_tok, output_size in (None, hidden_size))
        self.num_routed = self.slots.total - self.num_shared
        self.num_choices = num_experts_per_tok - self.num_shared
        self.free_experts: nn.Module | None = None
        self.couples = False
        self.make_parameters(hidden_size)

    @classmethod
    def make_slots(cls, num_experts: int, num_experts_per_tok: int, keeps_width: bool) -> Slots:
        """What it chooses among; `keeps_width`: outputs are as wide as inputs."""
        return Slots(num_experts)

    def make_parameters(self, hidden_size: int) -> None:
        self.weight = nn.Parameter(torch.empty(self.num_routed, hidden_size))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """N(0, 0.02), also after upcycling."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD, generator=generator)

    def forward(self, x_TD: Tensor) -> Routing:
        with without_autocast(x_TD.device.type):
            return self.with_rows(self.route(self.logits(x_TD)))

    def with_rows(self, routing: Routing) -> Routing:
        """With what the coupling loss reads: ZeRO-3 gathers parameters for this call. In a recomputation too."""
        if not (self.couples and self.training and torch.is_grad_enabled()):
            return routing
        return routing._replace(rows_RD=self.rows())

    @property
    def num_proxies(self) -> int:
        """Experts that have a row."""
        return self.slots.num_experts - self.num_shared

    def rows(self) -> Tensor:
        """[R, D] float32: what a token is multiplied with to give each routed expert's logit."""
        return self.weight.float()[: self.num_proxies]

    def logits(self, x_TD: Tensor) -> Tensor:
        return float32_linear(x_TD, self.weight)

    def route(self, logits_TR: Tensor) -> Routing:
        raise NotImplementedError

    @classmethod
    def balance_of(cls, slots: Slots, scores_TLR: Tensor, shares_SLR: Tensor) -> tuple[Tensor, Tensor]:
        """What the balance loss reads: scores whose softmax has to be even, and R times each slot's share of choices in
        a sequence, without gradient."""
        return scores_TLR, shares_SLR

    @classmethod
    def extra_losses(cls, slots: Slots, scores_TLR: Tensor) -> dict[str, Tensor]:
        """Of each token, [T, L], the terms of `extra_coefs`, without their `_coef`, as `_loss`."""
        return {}

    def end_step(self, load_E: Tensor) -> None:
        """After an optimizer step, with the choices that each expert got in it, on all ranks; needs `needs_loads`."""

    def renormalised(self, logits_TR: Tensor, log_scores_TR: Tensor) -> Routing:
        """Choose the largest scores and weight by them, renormalised over the choices.

        Given as logarithms (up to a constant of the token), for then scores that underflow still differ, and a single
        choice has a weight of exactly 1 and a gradient of exactly 0.
        """
        return Routing(logits_TR, logits_TR, *_TopWeights.apply(log_scores_TR, self.num_choices))


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
        reduced_TR = self.direction(float32_linear(x_TD, self.inp_reduction))
        # The published code rescales the stored rows in place: the scale takes no part in the gradient.
        embeddings_ER = self.expert_embeddings.float()
        return F.linear(reduced_TR, embeddings_ER * self.row_scale(embeddings_ER.detach()))

    def rows(self) -> Tensor:
        """Through the reduction; the length of a token is apart."""
        embeddings_ER = self.expert_embeddings.float()
        return (embeddings_ER * self.row_scale(embeddings_ER.detach())) @ self.inp_reduction.float()

    def direction(self, reduced_TR: Tensor) -> Tensor:
        return _Direction.apply(reduced_TR, XMOE_EPS, 0.0)

    def row_scale(self, embeddings_ER: Tensor) -> Tensor:
        return COSINE_NORM / embeddings_ER.norm(dim=-1, keepdim=True)

    def route(self, logits_TR: Tensor) -> Routing:
        scores_TR = logits_TR / COSINE_TEMPERATURE
        probs_TR = scores_TR.softmax(-1)
        return Routing(logits_TR, scores_TR, *_TopWeights.apply(probs_TR, self.num_choices))


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
        return super().renormalised(logits_TR, log_scores_TR)._replace(shared_weight=SHARED_WEIGHT)


class SharedSoftmaxRouter(_SharedExpert, SoftmaxRouter):
    """SharedE-V2: the softmax router beside a shared expert."""


class SharedSigmoidRouter(_SharedExpert, SigmoidRouter):
    """SharedE-V3: the sigmoid router beside a shared expert."""
