"""Experts spread over the ranks of a group (`moe.expert_parallel`): each holds E / N of a layer's, and tokens travel.

The mathematics stays where it is. A rank runs its own experts by the functions that run all of them elsewhere, on the
tokens that others sent; the rest of the block, from the router to the losses, sees tokens, affinities and outputs as if
all experts were here. What a passage needs from the host are the numbers of rows that each rank sends to each: one
vector a layer on a router's step. Every rank comes to every passage, forwards and backwards, also without a token.

Backwards a passage goes the other way, so that a rank's experts get the gradients of all the group's losses. Nothing is
dropped: in the worst case one rank gets the tokens of all. Suffixes: T tokens of this rank, G of all ranks of the group
by rank, K chosen, P = T K pairs sorted by expert, R rows that came here, N ranks, E experts, L = E / N of them here, H
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.competition import Picked, Responses
from llava_compete.moe.pairs import Combine, Dispatch, DistinctRows, Pairs
from llava_compete.moe.routers import top_experts


class Trip(NamedTuple):
    """Where the rows of pairs sorted by expert go, and what comes here for them."""

    pairs: Pairs
    sent: list[int]  # rows to each rank
    received: list[int]
    expert_R: Tensor  # int64, from 0 in this rank's experts; rows of a rank come by expert


class ExpertRanks:
    """The experts of one layer over a process group: rank n of it holds experts n L to (n + 1) L - 1."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.num_experts, self.num_local = num_experts, num_experts // self.size

    @property
    def local(self) -> slice:
        """This rank's, of all experts."""
        return slice(self.rank * self.num_local, (self.rank + 1) * self.num_local)

    # ---- a router's step ----

    @torch.compiler.disable
    def run_chosen(
        self,
        x_TD: Tensor,
        selected_TK: Tensor,
        weights_TK: Tensor,
        run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        heard_T: Tensor | None,
    ) -> Tensor:
        """The weighted sums [T, O] of the selected experts' outputs.

        Args:
            selected_TK: numbers of experts, E for none.
            run: rows [R, D], their experts here [R, 1] and which of them are heard [R], to outputs [R, O].
            heard_T: 1 for each token whose answers count, else 0; None where nobody asks.
        """
        trip = self._plan(selected_TK)
        pairs, travels = trip.pairs, sum(trip.sent)  # rows of no expert, which come last, stay
        heard_R = None if heard_T is None else self._there(heard_T.index_select(0, pairs.token_P)[:travels], trip)
        x_RD = self._there(Dispatch.apply(x_TD, pairs)[:travels], trip)
        y_PO = self._back(run(x_RD, trip.expert_R[:, None], heard_R), trip)
        y_PO = F.pad(y_PO, (0, 0, 0, len(pairs.token_P) - travels))
        return Combine.apply(y_PO, weights_TK.to(y_PO.dtype), pairs)

    def _plan(self, selected_TK: Tensor) -> Trip:
        pairs = Pairs.sort(selected_TK, self.num_experts, has_idle=True)
        sent_NL = torch.diff(pairs.ends_E, prepend=pairs.ends_E.new_zeros(1)).view(self.size, self.num_local)
        received_NL = torch.empty_like(sent_NL)
        dist.all_to_all_single(received_NL, sent_NL, group=self.group)
        sent, received = torch.stack([sent_NL.sum(1), received_NL.sum(1)]).tolist()
        experts_NL = torch.arange(self.num_local, device=selected_TK.device).expand_as(received_NL)
        expert_R = torch.repeat_interleave(experts_NL.flatten(), received_NL.flatten(), output_size=sum(received))
        return Trip(pairs, sent, received, expert_R)

    def _there(self, rows_PH: Tensor, trip: Trip) -> Tensor:
        return _Exchange.apply(rows_PH, trip.sent, trip.received, self.group)

    def _back(self, rows_RH: Tensor, trip: Trip) -> Tensor:
        return _Exchange.apply(rows_RH, trip.received, trip.sent, self.group)

    # ---- a competition ----

    @torch.compiler.disable
    def compete(self, x_TD: Tensor, num_winners: int, contest: Callable[[Tensor, int], Picked]) -> Picked:
        """What a contest of all experts finds, as if they were here.

        Args:
            contest: tokens [G, D] and a number of winners to what a contest of this rank's experts alone finds. Who
                wins among all has won here: so many winners of each rank are enough, and no other output is kept.
        """
        lengths = self._lengths(x_TD)
        here = contest(_Gather.apply(x_TD, lengths, self.group), min(num_winners, self.num_local))
        affinity_TE = self._home(here.affinity_TE, lengths)
        # A token's affinities are NaN where one output is not finite: also those of the other ranks' experts.
        affinity_TE = torch.add(affinity_TE, affinity_TE.sum(-1, keepdim=True), alpha=0)
        winners_TK = top_experts(affinity_TE.detach(), num_winners)
        trip = self._plan(winners_TK)
        start = sum(lengths[: self.rank])
        token_R = self._there(trip.pairs.token_P + start, trip)
        slot_R = (here.winners_TK.index_select(0, token_R) == trip.expert_R[:, None]).int().argmax(1)
        rows_R = token_R * here.winners_TK.shape[1] + slot_R
        won_PO = self._back(DistinctRows.apply(here.won_TKO.flatten(0, 1), rows_R), trip)
        won_TKO = DistinctRows.apply(won_PO, trip.pairs.place_TK.flatten()).view(*winners_TK.shape, won_PO.shape[1])
        return Picked(affinity_TE, winners_TK, won_TKO)

    @torch.compiler.disable
    def respond(self, x_TD: Tensor, num_winners: int, respond: Callable[[Tensor], Tensor]) -> Responses:
        """Affinities and winners of a competition that only teaches; `respond`: tokens [G, D] to affinities [G, L]."""
        lengths = self._lengths(x_TD)
        affinity_TE = self._home(respond(_gathered(x_TD, lengths, self.group)), lengths)
        affinity_TE = torch.add(affinity_TE, affinity_TE.sum(-1, keepdim=True), alpha=0)
        return Responses(affinity_TE, top_experts(affinity_TE, num_winners))

    # ---- the loss's judgement, in backward ----

    def ask(
        self,
        x_TD: Tensor,
        grad_TO: Tensor,
        contested_TE: Tensor,
        values: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """<g, Y_j> of the contested experts, [T, E].

        Args:
            values: tokens [G, D], gradients [G, O] and which of this rank's experts are asked [G, L], to theirs [G, L].
        """
        lengths = self._lengths(x_TD)
        contested_NTL = contested_TE.view(-1, self.size, self.num_local).transpose(0, 1)
        # As bytes: not every backend sends booleans.
        contested_GL = self._spread(contested_NTL.flatten(0, 1).to(torch.uint8), lengths).bool()
        x_GD, grad_GO = (_gathered(tensor, lengths, self.group) for tensor in (x_TD, grad_TO))
        return self._home(values(x_GD, grad_GO, contested_GL), lengths)

    # ---- passages ----

    def _lengths(self, x_TD: Tensor) -> list[int]:
        """How many tokens each rank has."""
        lengths_N = torch.empty(self.size, dtype=torch.int64, device=x_TD.device)
        mine_N = torch.full_like(lengths_N, len(x_TD))
        dist.all_to_all_single(lengths_N, mine_N, group=self.group)
        return lengths_N.tolist()

    def _home(self, values_GL: Tensor, lengths: list[int]) -> Tensor:
        """Values of all tokens and this rank's experts -> of this rank's tokens and all experts, [T, E]."""
        here = [lengths[self.rank]] * self.size
        values_NTL = _Exchange.apply(values_GL, lengths, here, self.group).view(self.size, here[0], self.num_local)
        return values_NTL.transpose(0, 1).reshape(here[0], self.num_experts)

    def _spread(self, rows_NT: Tensor, lengths: list[int]) -> Tensor:
        """Rows for each rank, as many as tokens, one rank's behind another's -> those for this one, [G, ...]."""
        return _exchanged(rows_NT, [lengths[self.rank]] * self.size, lengths, self.group)


class _Exchange(torch.autograd.Function):
    """Rows by the rank that they go to -> rows by the rank that they are from; `sent` and `received` are numbers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = received, sent, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, *ctx.back), None, None, None


class _Gather(torch.autograd.Function):
    """Tokens of this rank -> of all, by rank; backwards each rank's sum over what all made of its own."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.lengths, ctx.group, ctx.here = lengths, group, len(x_TH)
        return _gathered(x_TH, lengths, group)

    @staticmethod
    def backward(ctx: Any, grad_GH: Tensor) -> tuple[Tensor, None, None]:
        size = len(ctx.lengths)
        grad_NTH = _exchanged(grad_GH, ctx.lengths, [ctx.here] * size, ctx.group).view(size, ctx.here, -1)
        return grad_NTH.sum(0), None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    here = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(here, rows.contiguous(), received, sent, group=group)
    return here


def _gathered(x_TH: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """By a passage from all to all, since ranks have unlike numbers of tokens."""
    return _exchanged(x_TH.repeat(len(lengths), 1), [len(x_TH)] * len(lengths), lengths, group)
