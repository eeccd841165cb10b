"""Experts that go on from what all of them have computed of each token: those of Autonomy-of-Experts (autonomy.py).

Gated ones have `gate_proj` [E, I, r], from the low-rank half, and `up_proj` [E, I, D]; plain ones `up_proj` [E, I, r]
alone; both `down_proj` [E, O, I], and `*_bias` if the dense MLP has them. Suffixes: T tokens, P pairs sorted by expert,
K chosen, E experts, D in, H = r, I hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.moe.all_experts import AllExpertsDown, AllExpertsUp
from llava_compete.moe.experts import PackedExperts
from llava_compete.moe.grouped import DispatchUp, aligned
from llava_compete.moe.implementations import ExpertWeights, choose, chosen_linear, linear_of
from llava_compete.moe.looped import grouped_linear
from llava_compete.moe.pairs import Dispatch, DistinctRows, Pairs
from llava_compete.moe.precision import compute_dtype, without_autocast

Linear = tuple[Tensor, Tensor | None]


class FactorisedWeights(ExpertWeights):
    """Beside the weights the low-rank halves of this call's tokens; `high` [E, I, r] continues from them."""

    def __init__(self, low_TEH: Tensor, high: Linear, up: Linear | None, down: Linear, **options: Any) -> None:
        super().__init__(*(high if up is None else up), *down, **options)
        self.low_TEH, self.high, self.high_bias = low_TEH, *high

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return (self.high, self.up, self.down) if self.has_gate else (self.up, self.down)

    def _hidden(self, of_low: Tensor, of_token: Tensor | None) -> Tensor:
        if of_token is None:
            return self.act_fn(of_low)
        return self.gate_dropout(self.act_fn(of_low) * of_token)

    def _numbers(self, experts: Tensor, tokens: Tensor) -> Tensor:
        """Where the low-rank half of a token and expert lies among all."""
        return tokens * self.num_experts + experts

    def of_pairs(self, x_TD: Tensor, pairs: Pairs) -> Tensor:
        numbers_P = self._numbers(pairs.expert_P.long(), pairs.token_P)
        low_PH = DistinctRows.apply(self.low_TEH.flatten(0, 1), numbers_P)
        of_low_PI = grouped_linear(low_PH, self.high, self.high_bias, pairs.ends_E)
        if not self.has_gate:
            return self._hidden(of_low_PI, None)
        return self._hidden(of_low_PI, grouped_linear(Dispatch.apply(x_TD, pairs), self.up, self.up_bias, pairs.ends_E))

    def grouped(
        self, x_TD: Tensor, pairs: Pairs, marks_PE: Tensor | None, has_shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        numbers_P = self._numbers(pairs.expert_P.long(), pairs.token_P)
        low_PH = DistinctRows.apply(self.low_TEH.flatten(0, 1), numbers_P)
        # Rows that are sorted already, each a token of its own.
        alone = pairs._replace(token_P=pairs.row_P, place_TK=pairs.row_P[:, None])
        of_low_PI, _ = DispatchUp.apply(low_PH, aligned(self.high), self.high_bias, alone, marks_PE, False)
        if not self.has_gate:
            return self._hidden(of_low_PI, None), None
        of_token_PI, _ = DispatchUp.apply(x_TD, aligned(self.up), self.up_bias, pairs, marks_PE, False)
        return self._hidden(of_low_PI, of_token_PI), None

    def of_all(self, x_TD: Tensor) -> Tensor:
        of_low_TEI = AllExpertsDown.apply(self.low_TEH, self.high, self.high_bias).transpose(0, 1)
        of_token_TEI = AllExpertsUp.apply(x_TD, self.up, self.up_bias) if self.has_gate else None
        return self._hidden(of_low_TEI, of_token_TEI)

    def of_chosen(self, x_1D: Tensor, chosen_K: Tensor) -> Tensor:
        low_K1H = self.low_TEH[0].index_select(0, chosen_K)[:, None]
        of_low_K1I = chosen_linear(low_K1H, self.high, self.high_bias, chosen_K)
        if not self.has_gate:
            return self._hidden(of_low_K1I, None)
        x_K1D = x_1D.expand(len(chosen_K), 1, -1)
        return self._hidden(of_low_K1I, chosen_linear(x_K1D, self.up, self.up_bias, chosen_K))

    def of_one(self, x_1D: Tensor, expert: int) -> Tensor:
        of_low_1I = linear_of(self.low_TEH[:, expert], self.high, self.high_bias, expert)
        return self._hidden(of_low_1I, linear_of(x_1D, self.up, self.up_bias, expert) if self.has_gate else None)


class FactorisedExperts(PackedExperts):
    """Called with `low_TEH` [T, E, r] beside what other experts get; they hold no competitions and are not spread."""

    rank: int

    def __init__(self, *arguments: Any, rank: int, **options: Any) -> None:
        self.rank = rank
        super().__init__(*arguments, **options)

    def make_parameters(self, hidden_size: int, intermediate_size: int, output_size: int) -> None:
        self.up_name, self.high_name = "up_proj", "gate_proj" if self.has_gate else "up_proj"
        shapes = {self.high_name: (intermediate_size, self.rank)}
        if self.has_gate:
            shapes["up_proj"] = (intermediate_size, hidden_size)
        self.add_linears({**shapes, "down_proj": (output_size, intermediate_size)})

    @property
    def high(self) -> Tensor:
        """[E, I, r], what the first projection's lower half is multiplied with."""
        return getattr(self, self.high_name)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, choices_TC: Tensor, weights_TC: Tensor, *, low_TEH: Tensor
    ) -> Tensor:
        """The weighted sum [T, O] of the chosen experts' outputs."""
        dtype = compute_dtype(x_TD, self.down_proj)
        with without_autocast(x_TD.device.type):
            weights = FactorisedWeights(
                low_TEH.to(dtype),
                self.linear(self.high_name, dtype),
                self.linear(self.up_name, dtype) if self.has_gate else None,
                self.linear("down_proj", dtype),
                **self.weights_options,
            )
            function = choose(self.implementation, weights, len(x_TD), choices_TC.shape[1], x_TD.device)
            return function(weights, x_TD.to(dtype), choices_TC, weights_TC, 0.0)


def first_rank(requested: int | None, hidden_size: int, intermediate_size: int, part: str) -> int:
    """The rank of experts' first projection; refuses one that adds nothing."""
    full = min(hidden_size, intermediate_size)
    if requested is not None and requested > full:
        raise UserError(
            f"moe.{part}.autonomy_rank: found {requested}, expected at most {full}, the rank of a projection from "
            f"{hidden_size} to {intermediate_size}"
        )
    return full if requested is None else requested
