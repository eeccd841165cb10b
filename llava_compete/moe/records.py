"""What a layer's forward leaves behind, and what is computed from it: the losses of routing and sums for the log.

Both are computed when read, and for many layers at once: the tensors are small, so that their cost to a GPU is the
number of operators that its host launches, and L layers side by side take as many as one. Suffixes: T tokens, L layers,
E experts, R routed experts, C choices of the router, K chosen, with a shared expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llava_compete.moe import losses
from llava_compete.moe.competition import Contest, Responses
from llava_compete.moe.judged import Judgement, contested
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.metrics import RoutingMetrics
from llava_compete.moe.precision import without_autocast
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.routers import Routing
from llava_compete.moe.slots import Slots
from llava_compete.moe.state import TokenGroups


class RoutingObservation(NamedTuple):
    """What a layer did with each token, without gradient: the softmax's scores, the router's choices, and the experts
    that were used with their weights (on a competition step the winners). Where a router has more slots than experts,
    slots stand for experts."""

    scores_TR: Tensor
    choices_TC: Tensor
    used_TK: Tensor
    weights_TK: Tensor
    num_experts: int
    competed: bool
    groups: TokenGroups


@dataclass(frozen=True)
class RoutingRecord:
    """One layer's forward; `contest`: of a competition step; `taught_TR`: the router's logits, for the distillation;
    `judgement`: where this step's loss judges; `coupling`: the coupling loss, of parameters alone.

    `aux_loss`, with gradient, is the sum of `losses` (unscaled, without gradient) times their coefficients.
    """

    routing: Routing
    contest: Contest | Responses | None
    groups: TokenGroups
    config: MoeLayerConfig
    taught_TR: Tensor
    slots: Slots
    judgement: Judgement | None = None
    coupling: Tensor | None = None

    @cached_property
    def _alone(self) -> LayerStack:
        return LayerStack([self])

    @property
    def losses(self) -> dict[str, Tensor]:
        return {name: values_L[0] for name, values_L in self._alone.losses.items()}

    @property
    def aux_loss(self) -> Tensor:
        return self._alone.aux_loss_L[0]

    @property
    def metrics(self) -> RoutingMetrics:
        return RoutingMetrics.from_vector(self._alone.sums_LM[0])

    @property
    def observation(self) -> RoutingObservation:
        routing, contest = self.routing, self.contest
        return RoutingObservation(
            scores_TR=routing.scores_TR.detach(),
            choices_TC=routing.choices_TC,
            used_TK=contest.winners_TK if isinstance(contest, Contest) else routing.selected_experts_TK,
            weights_TK=(contest.weights_TK if isinstance(contest, Contest) else routing.routing_weights_TK).detach(),
            num_experts=self.slots.total,
            competed=contest is not None,
            groups=self.groups,
        )


class LayerStack:
    """Records of L layers of one part, all of router steps or all of competition steps."""

    def __init__(self, records: list[RoutingRecord]) -> None:
        self.records = records
        self.config, self.groups, self.slots = records[0].config, records[0].groups, records[0].slots
        self.router = ROUTER_CLASSES[self.config.router]
        self.competed = records[0].contest is not None
        self.took_winners = isinstance(records[0].contest, Contest)

    @property
    def aux_loss_L(self) -> Tensor:
        """With gradient."""
        return self._losses[0]

    @property
    def losses(self) -> dict[str, Tensor]:
        """By term [L], unscaled and without gradient."""
        return self._losses[1]

    @cached_property
    def _losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        coefs = self.config.loss_coefs(self.competed)
        with without_autocast(self.records[0].taught_TR.device.type):
            if self.took_winners:
                diversity_TL = self._of_contests("diversity_T")
                tensors = (self._taught_TLR, self._affinity_TLE, self._used_TLK, self._counted_TLC, diversity_TL)
                # Evaluation may hold such a competition where training only teaches, which has no term for diversity.
                terms = losses.competition_losses(*tensors, self.groups, {"diversity_loss": 0.0, **coefs})._asdict()
            else:
                logits_TLR = _beside([record.routing.logits_TR for record in self.records])
                scores_TLR = self._scores_TLR if self._has_own_scores else logits_TLR
                shares_SLR = losses.choice_shares(self._counted_TLC, logits_TLR, self.groups)
                routed = (logits_TLR, *self.router.balance_of(self.slots, scores_TLR, shares_SLR))
                if self.competed:
                    lesson = (self._taught_TLR, self._affinity_TLE, self._of_contests("winners_TK"))
                    terms = losses.teaching_losses(*routed, *lesson, self.groups, coefs)._asdict()
                else:
                    terms = losses.router_losses(*routed, self.groups, coefs)._asdict()
                    extra = self.router.extra_losses(self.slots, scores_TLR)
                    self._add(terms, {name: losses.token_mean(of_T, self.groups) for name, of_T in extra.items()})
            if self.records[0].coupling is not None:
                # Of no token: each micro-batch and rank has its share of it, which is that of its sequences.
                losses_L = torch.stack([record.coupling for record in self.records if record.coupling is not None])
                self._add(terms, {"coupling_loss": losses_L * self.groups.token_weights_T.sum()})
        return terms.pop("aux_loss"), terms

    def _add(self, terms: dict[str, Tensor], more: dict[str, Tensor]) -> None:
        """Further terms [L], with gradient."""
        coefs = self.config.loss_coefs(self.competed)
        for name, values_L in more.items():
            terms["aux_loss"] = torch.add(terms["aux_loss"], values_L, alpha=coefs[name])
            terms[name] = values_L.detach()

    @property
    def _taught_TLR(self) -> Tensor:
        return _beside([record.taught_TR for record in self.records])

    @cached_property
    def _affinity_TLE(self) -> Tensor:
        return self._of_contests("affinity_TE")

    def _of_contests(self, name: str) -> Tensor:
        return _beside([getattr(record.contest, name) for record in self.records])

    @cached_property
    @torch.no_grad()
    def sums_LM(self) -> Tensor:
        """[L, 9 + E]: each layer's `RoutingMetrics` as their vector; all sums are one product over tokens."""
        scores_TLR, num_experts = self._scores_TLR.detach(), self.slots.total
        judgement = self.records[0].judgement
        with without_autocast(scores_TLR.device.type):
            probs_TLR = scores_TLR.softmax(-1)
            choices_TLC = self._choices_TLC
            used_TLE = probs_TLR.new_zeros(*probs_TLR.shape[:2], num_experts).scatter_(2, self._used_TLK, 1.0)
            if not self.took_winners and probs_TLR.shape[2] < num_experts:
                used_TLE[:, :, probs_TLR.shape[2] :] = 1.0  # shared experts
            left_out_TL1 = probs_TLR.scatter(2, choices_TLC, 0.0).amax(-1, keepdim=True)
            one_TL1 = probs_TLR.new_ones(()).expand_as(left_out_TL1)
            found_TL1 = 0 * one_TL1
            if self.competed:
                won_TLE = torch.zeros_like(used_TLE).scatter_(2, self._of_contests("winners_TK"), 1.0)
                found_TL1 = won_TLE.gather(2, choices_TLC).mean(-1, keepdim=True)
            columns = [
                one_TL1,
                used_TLE,
                torch.special.entr(probs_TLR).sum(-1, keepdim=True),
                probs_TLR.gather(2, choices_TLC[:, :, -1:]) - left_out_TL1,
                (self._weights_TLK == 0).sum(-1, keepdim=True, dtype=probs_TLR.dtype),
                found_TL1,  # winners that the router's choice also has
                one_TL1 if self.competed else 0 * one_TL1,
                torch.special.entr(self._affinity_TLE.softmax(-1)).sum(-1, keepdim=True)
                if self.competed
                else 0 * one_TL1,
                *((0 * one_TL1, 0 * one_TL1) if judgement is None else (self._asked(probs_TLR, judgement), one_TL1)),
            ]
            values_TLM = torch.cat(columns, 2)
            return (self.groups.counted_T @ values_TLM.flatten(1)).view(values_TLM.shape[1:])

    def _asked(self, probs_TLE: Tensor, judgement: Judgement) -> Tensor:
        """[T, L, 1]: the share of the experts not chosen that a token asks."""
        chosen_RK = self._choices_TLC.flatten(0, 1)
        asked_RE = contested(probs_TLE.flatten(0, 1), chosen_RK, judgement)
        others = probs_TLE.shape[2] - chosen_RK.shape[1]
        return (asked_RE.sum(-1, keepdim=True, dtype=probs_TLE.dtype) / others).view(*probs_TLE.shape[:2], 1)

    @property
    def _has_own_scores(self) -> bool:
        routing = self.records[0].routing
        return routing.scores_TR is not routing.logits_TR

    @cached_property
    def _scores_TLR(self) -> Tensor:
        return _beside([record.routing.scores_TR for record in self.records])

    @cached_property
    def _choices_TLC(self) -> Tensor:
        return _beside([record.routing.choices_TC for record in self.records])

    @cached_property
    def _used_TLK(self) -> Tensor:
        """The winners of a competition, else the router's choice, without a shared expert."""
        return self._of_contests("winners_TK") if self.took_winners else self._choices_TLC

    @property
    def _counted_TLC(self) -> Tensor:
        return self._used_TLK[:, :, :1] if self.config.balance_over == "first_choice" else self._used_TLK

    @property
    def _weights_TLK(self) -> Tensor:
        if self.took_winners:
            return self._of_contests("weights_TK")
        return _beside([record.routing.weights_TC for record in self.records])


def stack_layers(records: dict[str, RoutingRecord]) -> dict[tuple[str, ...], LayerStack]:
    """Records, by layer, as stacks by names of layers: those of one part, step and device."""
    kinds: dict[object, list[str]] = {}
    for name, record in records.items():
        kind = (id(record.groups), id(record.config), type(record.contest), record.judgement, record.taught_TR.device)
        kinds.setdefault(kind, []).append(name)
    return {tuple(names): LayerStack([records[name] for name in names]) for names in kinds.values()}


def _beside(tensors: list[Tensor]) -> Tensor:
    """Tensors [T, ...] as [T, L, ...]."""
    return tensors[0].unsqueeze(1) if len(tensors) == 1 else torch.stack(tensors, 1)
