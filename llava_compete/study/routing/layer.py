"""A sparse layer of R runs at once: `SparseMoeBlock` with a leading dimension, and what only this study asks of it.

Equal to the block in output, losses and gradients for every router and judge that the block has
(tests/study/routing/test_layer.py). Suffixes: R runs, T tokens, D width in and out, E experts, I hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.routers import INIT_STD
from llava_compete.moe.ternary import TernaryRouter
from llava_compete.moe.zero_computation import CONSTANT_STD, CONSTANTS
from llava_compete.study.routing.choice import Choice, largest
from llava_compete.study.routing.draws import generator_of, normal, uniform
from llava_compete.study.routing.judging import Judging
from llava_compete.study.routing.mixture import Mixture, Question
from llava_compete.study.routing.operators import RouterAux
from llava_compete.study.routing.routers import Routers, random_choice
from llava_compete.study.routing.routers import uniform as uniform_rows
from llava_compete.study.routing.rules import COMPETITION, Rule
from llava_compete.study.routing.slotted import free_answers

_REMOE_GROWTH, _REMOE_START = 1.2, 1e-8


@dataclass(frozen=True)
class Widths:
    """num_experts E of `intermediate` I hidden units, num_chosen K of them, on tokens of `hidden` D; `rank` of their
    first projection where it is factorised."""

    num_experts: int
    num_chosen: int
    hidden: int
    intermediate: int
    rank: int = 0

    def of(self, rule: Rule) -> Widths:
        """Dense: one expert of the active or of the whole size. With a shared expert K = 3, for at 2 its router learns
        nothing: experts two thirds as wide, half as many again, so that both sizes stay. Autonomous experts: of a third
        of the full rank, which the paper finds best where experts are wider than tokens, and as wide as leaves their
        size (its equation 5)."""
        if rule.dense:
            factor = self.num_chosen if rule.dense == "active" else self.num_experts
            return Widths(1, 1, self.hidden, factor * self.intermediate)
        if rule.shared and self.num_chosen == 2:
            return Widths(self.num_experts * 3 // 2, 3, self.hidden, self.intermediate * 2 // 3)
        if rule.router == "autonomy":
            rank = max(1, min(self.hidden, self.intermediate) // 3)
            left = 2 * self.intermediate * self.hidden - rank * self.hidden
            return Widths(self.num_experts, self.num_chosen, self.hidden, left // (rank + self.hidden), rank)
        return self

    @property
    def inputs(self) -> int:
        """Of an expert's up projection."""
        return self.rank or self.hidden

    @property
    def unchosen(self) -> float:
        """What experts that are not chosen have computed of a token, as a share of one expert's arithmetic."""
        expert = self.hidden * (self.rank + self.intermediate) + self.inputs * self.intermediate
        return (self.num_experts - self.num_chosen) * self.rank * self.hidden / expert


class MoeLayer:
    """Parameters [R, ...], forward, losses, and the count of what was computed.

    Args:
        seeds: of the start, one a run.
        key: of the layer, such as 0.
        before: the layer before it, whose logits a router with a residual reads.
    """

    logits_RTS: Tensor | None = None

    def __init__(
        self, rule: Rule, widths: Widths, seeds: Sequence[int], key: int, device: str, before: MoeLayer | None = None
    ):
        self.before = before
        self.rule, self.widths, self.device = rule, widths.of(rule), device
        experts, chosen, hidden, inner = (
            self.widths.num_experts,
            self.widths.num_chosen,
            widths.hidden,
            self.widths.intermediate,
        )
        self.up = uniform((experts, inner, self.widths.inputs), self.widths.inputs, seeds, (key, "up"), device)
        fan_in = widths.intermediate if rule.expert_start else inner
        self.down = uniform((experts, inner, hidden), fan_in, seeds, (key, "down"), device)
        self.router = Routers(
            rule,
            {name: self._start(name, shape, seeds, key) for name, shape in self._router_shapes().items()},
            chosen,
            [generator_of(seed, key, "draws") for seed in seeds],
        )
        runs = len(seeds)
        self.judging = Judging(rule, key, (runs, experts, hidden), device)
        self.sparsity_R = torch.full((runs,), _REMOE_START, device=device)
        self.aux_R = torch.zeros(runs, device=device)
        self._extra_R, self._forwards = torch.zeros(runs, device=device), 0

    def _start(self, name: str, shape: tuple[int, ...], seeds: Sequence[int], key: int) -> Tensor:
        """A router's weight, [R, ...]."""
        if name == "low_proj":
            return uniform(shape, shape[-1], seeds, (key, name), self.device)
        return normal(shape, self._std(name), seeds, (key, name), self.device)

    def _std(self, name: str) -> float:
        return CONSTANT_STD if name.endswith("constants") else self.rule.router_std or INIT_STD

    def _router_shapes(self) -> dict[str, tuple[int, ...]]:
        routed, hidden = self.widths.num_experts - self.rule.shared, self.widths.hidden
        if not self.rule.has_router:
            return {}
        if self.widths.rank:
            return {"low_proj": (routed, self.widths.rank, hidden)}
        if self.rule.router in ("xmoe", "perturbed_cosine"):
            return {"inp_reduction": (routed // 2, hidden), "expert_embeddings": (routed, routed // 2)}
        if self.rule.router == "tc_moe":
            routed = 2 * routed + self.widths.num_chosen
        if self.rule.router == "moe_plus_plus":
            slots, free = routed + CONSTANTS + 2, "free_experts"
            more = {f"{free}.constants": (CONSTANTS, hidden), f"{free}.gates": (CONSTANTS, 2, hidden)}
            return {"weight": (slots, hidden), "residual": (slots, slots), **more}
        return {"weight": (routed, hidden)}

    @property
    def parameters(self) -> list[Tensor]:
        return [self.up, self.down, *self.router.weights.values()]

    @property
    def price_R(self) -> Tensor:
        """Arithmetic of experts beyond that of K a token, as a share of it: a forward alone is a third."""
        return self._extra_R / max(1, self._forwards) / self.widths.num_chosen

    def __call__(
        self,
        x_RTD: Tensor,
        *,
        sequences: int = 1,
        training: bool = True,
        competing_R: Tensor | None = None,
        fixed_RTE: Tensor | None = None,
    ) -> Tensor:
        """[R, T, D] -> [R, T, D]; tokens are `sequences` of equal length, one after another.

        competing_R: runs that compete or judge in this step; None for none. fixed_RTE: the choice of rule `fixed`.
        Leaves the auxiliary loss in `aux_R` while training.
        """
        rule, down = self.rule, self.down
        if rule.dense:
            ones = torch.ones(*x_RTD.shape[:2], 1, device=x_RTD.device)
            return Mixture.apply(self._hidden(x_RTD), ones, down, None, None)
        if not rule.has_router:
            chosen = fixed_RTE
            if rule.router == "random":
                shape = (*x_RTD.shape[:2], self.widths.num_experts)
                chosen = random_choice(shape, self.widths.num_chosen, self.router.generators, self.device)
            assert chosen is not None
            return Mixture.apply(self._hidden(x_RTD), chosen.float() / self.widths.num_chosen, down, None, None)
        choice = self.router(x_RTD, training, None if self.before is None else self.before.logits_RTS)
        self.logits_RTS = choice.logits_RTE
        hidden = self._hidden(x_RTD, choice.low_RTEH)
        question = None
        if rule.judge and training and competing_R is not None:
            question = self.judging.question(x_RTD.detach(), choice, competing_R)
        # A shared expert adds a column of weights; no judged rule has one.
        weights = choice.weights_RTE * choice.chosen_RTE if rule.router == "default_moe" else choice.weights_RTE
        output = Mixture.apply(hidden, weights, down, choice.logits_RTE if question else None, question)
        if choice.free_RTS is not None:
            of_router = (self.router.weights[f"free_experts.{name}"] for name in ("constants", "gates"))
            output = output + free_answers(x_RTD, choice.free_RTS, *of_router)
        if rule.router == "default_moe":
            output = output + self._means_of_others(choice)
        if training:
            self.aux_R = self._aux(choice, sequences)
            if rule.coupling_coef:
                self.aux_R = self.aux_R + rule.coupling_coef * self._coupling()
            self._count(choice, question)
            self._end_step(x_RTD, hidden, choice)
        if rule.response is not None and competing_R is not None:
            output = self._respond(hidden, output, choice, sequences, competing_R, training)
        return output

    def _hidden(self, x_RTD: Tensor, low_RTEH: Tensor | None = None) -> Tensor:
        if low_RTEH is not None:
            return F.gelu(torch.einsum("rteh,reih->rtei", low_RTEH, self.up))
        up = torch.bmm(x_RTD, self.up.flatten(1, 2).transpose(1, 2))
        return F.gelu(up).unflatten(2, self.up.shape[1:3])

    def _aux(self, choice: Choice, sequences: int) -> Tensor:
        rule, experts, first = self.rule, choice.logits_RTE.shape[-1], choice.first_RTE
        if rule.router == "remoe":
            used = choice.chosen_RTE.float().mean(1, keepdim=True) * (experts / self.widths.num_chosen)
            return self.sparsity_R * (used * choice.weights_RTE).sum(-1).mean(1)
        scores = None if choice.scores_RTE is choice.logits_RTE else choice.scores_RTE
        coefs = (rule.balance_coef, rule.router_z_coef)
        if choice.null_RT is None:
            return RouterAux.apply(choice.logits_RTE, scores, first, sequences, coefs)
        # Shares of the choices that are an expert's: where some are not, the others count for more.
        shape = (len(first), sequences, -1, first.shape[-1])
        counted = first.view(shape).sum((2, 3), keepdim=True).clamp(min=1)
        first = (first.view(shape) * (first.shape[1] / sequences / counted)).view_as(first)
        reward = TernaryRouter.extra_coefs["null_reward_coef"] * choice.null_RT.mean(1)
        return RouterAux.apply(choice.logits_RTE, scores, first, sequences, coefs) - reward

    def _coupling(self) -> Tensor:
        """The coupling loss (moe/coupling.py) with alpha 1, [R]."""
        rows = self.router.weights["weight"]
        shape = (rows.shape[0], rows.shape[1], rows.shape[2])
        self.noise_RED = 2 * uniform_rows(shape, self.router.generators, self.device) - 1
        with torch.no_grad():
            apart = torch.cdist(rows, rows).diagonal_scatter(torch.full(rows.shape[:2], torch.inf), 0, 1, 2)
            reach = apart.amin(-1, keepdim=True) / (2 * rows.norm(dim=-1, keepdim=True))
        moved = rows * (1 + reach * self.noise_RED)
        norms = torch.einsum("red,rfid->refi", moved, self.up).norm(dim=-1)
        own = norms.diagonal(dim1=1, dim2=2)
        # Each expert beside itself adds nothing.
        excess = (norms - own.unsqueeze(2)).relu() + (norms - own.unsqueeze(1)).relu()
        return excess.mean((1, 2))

    @torch.no_grad()
    def _count(self, choice: Choice, question: Question | None) -> None:
        self._forwards += 1
        if question is not None:
            judged = (question.strength != 0).float().mean((1, 2))
            self._extra_R += question.asked_RTE.sum(-1).float().mean(1) * judged / 3
            if self.rule.judge is not None and self.rule.judge.estimate == "linear":
                # A map of the token has D x D products, an expert D x I and I x D.
                assert question.estimated_RTE is not None
                share = self.widths.hidden / (2 * self.widths.intermediate)
                self._extra_R += question.estimated_RTE.sum(-1).float().mean(1) * judged * share / 3
        self._extra_R += self.widths.unchosen
        if self.rule.router == "remoe":
            self._extra_R += choice.chosen_RTE.sum(-1).float().mean(1) - self.widths.num_chosen

    @torch.no_grad()
    def _end_step(self, x_RTD: Tensor, hidden: Tensor, choice: Choice) -> None:
        self.router.end_step(choice)
        if self.rule.router == "remoe":
            too_many = choice.chosen_RTE.sum(-1).float().mean(1) - self.widths.num_chosen
            self.sparsity_R = self.sparsity_R * _REMOE_GROWTH ** torch.sign(too_many)
        self.judging.end_step(x_RTD, hidden, self.down, choice)

    def _means_of_others(self, choice: Choice) -> Tensor:
        """Default MoE's: running means speak for the experts that are not chosen."""
        others = choice.weights_RTE * (~choice.chosen_RTE & self.judging.seen_RFE)
        return torch.bmm(others, self.judging.means_RFEO[:, 0])

    def _respond(
        self, hidden: Tensor, output: Tensor, choice: Choice, sequences: int, competing_R: Tensor, training: bool
    ) -> Tensor:
        """A competition in the runs that hold one: their output and auxiliary loss in place of the router's."""
        response, runs = self.rule.response, competing_R.nonzero().flatten()
        assert response is not None
        if not len(runs):
            return output
        count, experts = self.widths.num_chosen, self.widths.num_experts
        answers = torch.matmul(hidden[runs].transpose(1, 2), self.down[runs])  # [R, E, T, O]
        if response.output == "router":
            answers = answers.detach()
        affinity = F.softplus(answers).mean(-1).transpose(1, 2)
        won, first = largest(affinity.detach(), count)
        weights = affinity * won
        weights = weights / weights.sum(-1, keepdim=True)
        if training:
            p, q = choice.logits_RTE[runs].softmax(-1), affinity.softmax(-1)
            squared = (p - q.detach()).square()
            distilled = (
                squared.mean((1, 2)) + COMPETITION["winner_distillation_coef"] * (squared * won).sum(-1).mean(1) / count
            )
            aux = COMPETITION["distillation_coef"] * distilled
            if response.output == "winners":
                directions = F.normalize(answers, dim=-1) * won.transpose(1, 2).unsqueeze(-1)
                cosines = directions.sum(1).square().sum(-1) - directions.square().sum((1, 3))
                aux = aux + COMPETITION["diversity_coef"] * cosines.mean(1) / count**2
                aux = aux + COMPETITION["competition_balance_coef"] * _balance(q, first, sequences)
                self.aux_R = self.aux_R.index_copy(0, runs, aux)
            else:  # the router's step stays as it is
                self.aux_R = self.aux_R.index_add(0, runs, aux)
            self._extra_R[runs] += (experts - count) * (1.0 if response.output == "winners" else 1 / 3)
        if response.output == "router":
            return output
        return output.index_copy(0, runs, torch.einsum("rte,reto->rto", weights, answers))


def layers(rule: Rule, widths: Widths, seeds: Sequence[int], count: int, device: str) -> list[MoeLayer]:
    """`count` layers, one behind the other."""
    made: list[MoeLayer] = []
    for key in range(count):
        made.append(MoeLayer(rule, widths, seeds, key, device, made[-1] if made else None))
    return made


def _balance(probs_RTE: Tensor, first_RTE: Tensor, sequences: int) -> Tensor:
    """E² x mean over (sequence, expert) of mean probability x share of first choices, [R]."""
    shape = (sequences, probs_RTE.shape[1] // sequences)
    shares = first_RTE.float().unflatten(1, shape).mean(2)
    return probs_RTE.shape[-1] * (probs_RTE.unflatten(1, shape).mean(2) * shares).sum(-1).mean(1)
