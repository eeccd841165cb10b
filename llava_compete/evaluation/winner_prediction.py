"""How much of who wins can be known beforehand: the router beside the best constant and a linear probe.

Agreement is the share of the K winners of a competition that a prediction of K experts contains. A router that agrees
in 62% says little where a constant agrees in 63%: then it has learnt which experts win, not when. The probe is a ridge
regression of the winners on the block's input, solved exactly; it has the router's own form and shows what was there
to be learnt. Constant and probe are fitted on one part of the data, and all three are measured on the other.
Suffixes: T tokens, D width, E experts, K winners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_compete.evaluation.routing_controls import Batch, competing
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.experts import ExpertsOutput
from llava_compete.moe.routers import Routing, top_experts

# Of the mean of the squared inputs: keeps directions that the data do not show from being read.
RIDGE = 1e-4


class Seen(NamedTuple):
    """What one layer met in one competition, counted tokens only: float32 inputs [T, D], winners and choices [T, K]."""

    inputs_TD: Tensor
    winners_TK: Tensor
    choices_TK: Tensor


@dataclass
class _Fit:
    """Sums of the normal equations, so that no token is kept; float64, for they are badly conditioned."""

    gram_XX: Tensor
    cross_XE: Tensor
    wins_E: Tensor

    @classmethod
    def empty(cls, width: int, num_experts: int, device: torch.device) -> _Fit:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(width + 1, width + 1, **options),
            torch.zeros(width + 1, num_experts, **options),
            torch.zeros(num_experts, **options),
        )

    def add(self, seen: Seen) -> None:
        inputs_TX = _with_one(seen.inputs_TD)
        won_TE = _marks(seen.winners_TK, len(self.wins_E)).double()
        self.gram_XX += inputs_TX.T @ inputs_TX
        self.cross_XE += inputs_TX.T @ won_TE
        self.wins_E += won_TE.sum(0)

    def probe(self) -> Tensor:
        """Weights [D + 1, E], the last row a constant."""
        scale = self.gram_XX.diagonal().mean()
        ridge_XX = RIDGE * scale * torch.eye(len(self.gram_XX), dtype=torch.float64, device=self.gram_XX.device)
        return torch.linalg.solve(self.gram_XX + ridge_XX, self.cross_XE)


def measure_prediction(model: Any, fitted: Sequence[Batch], held_out: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """By layer that can compete, the agreement of "router", "best_constant" and "linear_probe" on `held_out`.

    All layers compete, so that a layer's input comes from the competitions below it. Layers without tokens of both
    kinds are left out.
    """
    fits: dict[str, _Fit] = {}
    for name, seen in _seen(model, fitted):
        num_experts = moe_blocks(model)[name].config.num_experts
        fit = fits.setdefault(name, _Fit.empty(seen.inputs_TD.shape[1], num_experts, seen.inputs_TD.device))
        fit.add(seen)
    probes = {name: fit.probe() for name, fit in fits.items()}
    hits: dict[str, dict[str, float]] = {}
    tokens: dict[str, int] = {}
    for name, seen in _seen(model, held_out):
        if name not in fits:
            continue
        count = seen.winners_TK.shape[1]
        constant_K = fits[name].wins_E.topk(count).indices
        predicted = {
            "router": seen.choices_TK,
            "best_constant": constant_K.expand(len(seen.winners_TK), -1),
            "linear_probe": top_experts(_with_one(seen.inputs_TD) @ probes[name], count),
        }
        sums = hits.setdefault(name, dict.fromkeys(predicted, 0.0))
        for kind, experts_TK in predicted.items():
            sums[kind] += float(_found(seen.winners_TK, experts_TK).sum())
        tokens[name] = tokens.get(name, 0) + len(seen.winners_TK)
    return {name: {kind: value / tokens[name] for kind, value in sums.items()} for name, sums in hits.items()}


@torch.inference_mode()
def _seen(model: Any, batches: Sequence[Batch]) -> Iterator[tuple[str, Seen]]:
    """What every layer met, batch by batch."""
    for batch in batches:
        with competing(model), _watched(model) as found:
            model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
        yield from found.items()


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, Seen]]:
    """Inside, a forward leaves what its competitions met."""
    found: dict[str, Seen] = {}
    handles = []

    def watch(block: SparseMoeBlock) -> tuple[Callable[..., None], Callable[..., None]]:
        choices: list[Tensor] = []

        def routed(_module: Any, _inputs: Any, routing: Routing) -> None:
            choices[:] = [routing.choices_TC]

        def contested(_module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, ExpertsOutput) and output.contest is not None:
                counted_T = block.state.groups[block.part].counted_T > 0
                columns = inputs[0].float(), output.contest.winners_TK, choices[0]
                seen = Seen(*(column[counted_T] for column in columns))
                if len(seen.inputs_TD):
                    found[block.name] = seen

        return routed, contested

    for block in moe_blocks(model).values():
        routed, contested = watch(block)
        handles += [block.router.register_forward_hook(routed), block.experts.register_forward_hook(contested)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _found(winners_TK: Tensor, predicted_TK: Tensor) -> Tensor:
    """Share of a token's winners that were predicted, [T]."""
    return (winners_TK[:, :, None] == predicted_TK[:, None, :]).any(-1).float().mean(-1)


def _with_one(inputs_TD: Tensor) -> Tensor:
    return torch.cat([inputs_TD.double(), inputs_TD.new_ones(len(inputs_TD), 1, dtype=torch.float64)], dim=1)


def _marks(experts_TK: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(experts_TK), num_experts, device=experts_TK.device).scatter(1, experts_TK, 1.0)
