"""How exact the loss's judgement is in bfloat16, beside the gradient that the task itself gives the same router.

A block runs twice on the same numbers, in bfloat16 and in float32, with weights, tokens and the gradient of its output
rounded to bfloat16 before, so that only its arithmetic differs. Told are root mean squares over tokens of gradients at
the router's logits: the task's, the judgement's, and what bfloat16 moves each by. Where experts are copies of one
another, as upcycled, the judgement is 0 but for rounding. Suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_compete import files
from llava_compete.bench.moe import NAME, Shape
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.gradients import RouterGradients
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups

# How far experts have moved from the dense MLP that they were copies of: noise as a share of its weights' spread.
STARTS = {"upcycled": 0.0, "apart by 1%": 0.01, "apart by 10%": 0.1, "apart by 100%": 1.0}


@dataclass(frozen=True)
class Row:
    """Of one start: root mean squares over tokens, and the share of the experts not chosen that were asked."""

    start: str
    asked: float
    task: float
    judge: float
    task_noise: float
    judge_noise: float


class _Kept(RouterGradients):
    """Also keeps the gradients themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, Tensor] = {}

    def view(self, logits_TE: Tensor, source: str, layer: str, counted_T: Tensor | None) -> Tensor:
        view_TE = super().view(logits_TE, source, layer, counted_T)
        view_TE.register_hook(lambda grad_TE: self.gradients.update({source: grad_TE.double()}))
        return view_TE


def measure(shape: Shape, tokens: int, device: torch.device, margin: float = 0.8) -> list[Row]:
    """One row for each of `STARTS`."""
    return [_row(start, spread, shape, tokens, device, margin) for start, spread in STARTS.items()]


def _row(start: str, spread: float, shape: Shape, tokens: int, device: torch.device, margin: float) -> Row:
    torch.manual_seed(0)
    block = _block(shape, spread, margin).to(device)
    x_1TD, grad_1TO = (torch.randn(1, tokens, shape.D, device=device).bfloat16() for _ in range(2))
    exact, asked = _gradients(block, x_1TD, grad_1TO, torch.float32)
    rounded, _ = _gradients(block, x_1TD, grad_1TO, torch.bfloat16)
    size = {source: _root(exact[source]) for source in ("task", "judge")}
    noise = {source: _root(rounded[source] - exact[source]) for source in size}
    return Row(start, asked, size["task"], size["judge"], noise["task"], noise["judge"])


def _block(shape: Shape, spread: float, margin: float) -> SparseMoeBlock:
    """Experts `spread` apart, with weights that bfloat16 holds exactly."""
    config = {"num_experts": shape.E, "num_experts_per_tok": shape.K, "balance_coef": 0.0, "router_z_coef": 0.0}
    block = SparseMoeBlock(
        MoeLayerConfig.model_validate({**config, "competition_judge": "loss", "competition_margin": margin}),
        name=NAME,
        state=RoutingState(),
        hidden_size=shape.D,
        intermediate_size=shape.I,
        activation="silu" if shape.gated else "gelu",
        gated=shape.gated,
        bias=not shape.gated,
    )
    with torch.no_grad():
        for parameter in block.experts.parameters():
            apart = torch.randn_like(parameter) * spread * parameter.std()
            parameter.copy_(parameter[:1] + apart)
        for parameter in block.parameters():
            parameter.copy_(parameter.bfloat16())
    return block


def _gradients(
    block: SparseMoeBlock, x_1TD: Tensor, grad_1TO: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """At the router's logits, by source [T, E] in float64, and the share of experts asked."""
    block, state = block.to(dtype), block.state
    state.gradients = kept = _Kept()
    state.begin("language", TokenGroups.from_mask(torch.ones(x_1TD.shape[:2], device=x_1TD.device)))
    with state.recording():
        block(x_1TD.to(dtype)).backward(grad_1TO.to(dtype))
    asked = state.records[NAME].metrics.summary()["asked_share"]
    assert isinstance(asked, float)
    return kept.gradients, asked


def _root(grad_TE: Tensor) -> float:
    return math.sqrt(float(grad_TE.square().sum(-1).mean()))


def table(shape: Shape, rows: Sequence[Row]) -> Iterator[str]:
    """Lines for the console: gradients at the router's logits, and what bfloat16 moves them by."""
    yield f"{shape!s:<24}{'asked':>8}{'task':>11}{'judge':>11}{'task noise':>12}{'judge noise':>13}{'noise/task':>12}"
    for row in rows:
        line = f"{row.start:<24}{row.asked:>8.2f}{row.task:>11.2e}{row.judge:>11.2e}"
        share = row.judge_noise / row.task if row.task else math.nan
        yield line + f"{row.task_noise:>12.1e}{row.judge_noise:>13.1e}{share:>12.2g}"


def write_json(found: Sequence[tuple[Shape, Sequence[Row]]], path: Path) -> None:
    content: list[dict[str, Any]] = [{"shape": str(shape), **asdict(row)} for shape, rows in found for row in rows]
    files.write_json(path, content)
