"""Experts spread over the ranks of a group (`moe.expert_parallel`): each holds E / N of a layer's, and tokens travel.

The mathematics stays where it is. A rank runs its own experts by the functions that run all of them elsewhere, on the
tokens that others sent; the rest of the block, from the router to the losses, sees tokens, affinities and outputs as if
all experts were here. What a passage needs from the host are the numbers of rows that each rank sends to each: one
vector a layer on a router's step. Every rank comes to every passage, forwards and backwards, also without a token.
A shared expert, which every token would have to travel to, travels itself (`Loan`), and runs while rows do.

Backwards a passage goes the other way, so that a rank's experts get the gradients of all the group's losses. Nothing is
dropped: in the worst case one rank gets the tokens of all. Suffixes: T tokens of this rank, G of all ranks of the group
by rank, K chosen, P = T K pairs sorted by expert, R rows that came here, N ranks, E experts, L = E / N of them here, H
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.competition import Picked, Responses
from llava_compete.moe.pairs import Combine, Dispatch, DistinctRows, Pairs
from llava_compete.moe.passages import Flight, Gather, Loan, Passage, exchanged, gathering
from llava_compete.moe.routers import top_experts


class Trip(NamedTuple):
    """Where the rows of pairs sorted by expert go, and what comes here for them."""

    pairs: Pairs
    sent: list[int]  # rows to each rank
    received: list[int]
    expert_R: Tensor  # int64, from 0 in this rank's experts; rows of a rank come by expert


class Call(NamedTuple):
    """Tokens of all ranks on their way here, and how many each has."""

    lengths: list[int]
    flight: Flight


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
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The weighted sums [T, O] of the selected experts' outputs.

        Args:
            selected_TK: numbers of experts, E for none.
            run: rows [R, D], their experts here [R, 1] and which of them are heard [R], to outputs [R, O].
            heard_T: 1 for each token whose answers count, else 0; None where nobody asks.
            beside: this rank's tokens [t, D] to what is added to their sums [t, O]. Half of them run while rows travel
                to the experts, half while outputs come back.
        """
        trip = self._plan(selected_TK)
        pairs, travels = trip.pairs, sum(trip.sent)  # rows of no expert, which come last, stay
        going = self._there(Dispatch.apply(x_TD, pairs)[:travels], trip)
        heard = None if heard_T is None else self._there(heard_T.index_select(0, pairs.token_P)[:travels], trip)
        first, second = x_TD.tensor_split(2)
        added = [] if beside is None else [beside(first)]
        x_RD, heard_R = going.wait(), None if heard is None else heard.wait()
        coming = self._back(run(x_RD, trip.expert_R[:, None], heard_R), trip)
        added += [] if beside is None else [beside(second)]
        y_PO = F.pad(coming.wait(), (0, 0, 0, len(pairs.token_P) - travels))
        output_TO = Combine.apply(y_PO, weights_TK.to(y_PO.dtype), pairs)
        return output_TO + torch.cat(added) if added else output_TO

    def _plan(self, selected_TK: Tensor) -> Trip:
        pairs = Pairs.sort(selected_TK, self.num_experts, has_idle=True)
        sent_NL = torch.diff(pairs.ends_E, prepend=pairs.ends_E.new_zeros(1)).view(self.size, self.num_local)
        received_NL = torch.empty_like(sent_NL)
        dist.all_to_all_single(received_NL, sent_NL, group=self.group)
        sent, received = torch.stack([sent_NL.sum(1), received_NL.sum(1)]).tolist()
        experts_NL = torch.arange(self.num_local, device=selected_TK.device).expand_as(received_NL)
        expert_R = torch.repeat_interleave(experts_NL.flatten(), received_NL.flatten(), output_size=sum(received))
        return Trip(pairs, sent, received, expert_R)

    def _there(self, rows_PH: Tensor, trip: Trip) -> Passage:
        return Passage(rows_PH, trip.sent, trip.received, self.group)

    def _back(self, rows_RH: Tensor, trip: Trip) -> Passage:
        return Passage(rows_RH, trip.received, trip.sent, self.group)

    def lend(self, packed: tuple[Tensor, ...]) -> Loan:
        """Begin to lend the last expert to all ranks; `packed` are this rank's parameters."""
        return Loan(packed, self.group)

    # ---- a competition ----

    @torch.compiler.disable
    def compete(self, x_TD: Tensor, num_winners: int, contest: Callable[[Tensor, int], Picked]) -> Picked:
        """What a contest of all experts finds, as if they were here.

        Args:
            contest: tokens [G, D] and a number of winners to what a contest of this rank's experts alone finds. Who
                wins among all has won here: so many winners of each rank are enough, and no other output is kept.
        """
        lengths = self._lengths(x_TD)
        here = contest(Gather.apply(x_TD, lengths, self.group), min(num_winners, self.num_local))
        affinity_TE = self._home(here.affinity_TE, lengths)
        # A token's affinities are NaN where one output is not finite: also those of the other ranks' experts.
        affinity_TE = torch.add(affinity_TE, affinity_TE.sum(-1, keepdim=True), alpha=0)
        winners_TK = top_experts(affinity_TE.detach(), num_winners)
        trip = self._plan(winners_TK)
        start = sum(lengths[: self.rank])
        token_R = self._there(trip.pairs.token_P + start, trip).wait()
        slot_R = (here.winners_TK.index_select(0, token_R) == trip.expert_R[:, None]).int().argmax(1)
        rows_R = token_R * here.winners_TK.shape[1] + slot_R
        won_PO = self._back(DistinctRows.apply(here.won_TKO.flatten(0, 1), rows_R), trip).wait()
        won_TKO = DistinctRows.apply(won_PO, trip.pairs.place_TK.flatten()).view(*winners_TK.shape, won_PO.shape[1])
        return Picked(affinity_TE, winners_TK, won_TKO)

    def call(self, x_TD: Tensor) -> Call:
        """Begin to gather tokens, without gradients."""
        lengths = self._lengths(x_TD)
        return Call(lengths, gathering(x_TD, lengths, self.group))

    @torch.compiler.disable
    def respond(self, call: Call, num_winners: int, respond: Callable[[Tensor], Tensor]) -> Responses:
        """Affinities and winners of a competition that only teaches; `respond`: tokens [G, D] to affinities [G, L]."""
        affinity_TE = self._home(respond(call.flight.wait()), call.lengths)
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
        here = [lengths[self.rank]] * self.size
        # As bytes: not every backend sends booleans.
        asked = Flight(contested_NTL.flatten(0, 1).to(torch.uint8), here, lengths, self.group)
        coming = [gathering(tensor, lengths, self.group) for tensor in (x_TD, grad_TO)]
        contested_GL, x_GD, grad_GO = asked.wait().bool(), *(flight.wait() for flight in coming)
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
        values_NTL = exchanged(values_GL, lengths, here, self.group).view(self.size, here[0], self.num_local)
        return values_NTL.transpose(0, 1).reshape(here[0], self.num_experts)
