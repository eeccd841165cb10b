"""How many operators a GPU's host launches for one layer of a mixture in a training step, counted on fake CUDA tensors.

python tests/moe/operator_counts.py      prints a table

Of a part with 24 layers in bfloat16, one micro-batch: their forward, what is made of their records (losses, sums for
the log), and the backward, over 24; read off 2 and 3 layers. An operator is one launch or a few; views and allocations
are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_gpu import backward, fake_gpu, move_to_fake_gpu
from operator_kit import OperatorCounts

from llava_compete.model.losses import routing_losses
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.records import stack_layers
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.moe.terms import ROUTERS
from llava_compete.train.metrics import StepMetrics

LAYERS = 24


class Counts(NamedTuple):
    """Of all layers."""

    forward: int
    records: int
    backward: int


def count(
    router: str, *, competing: bool = False, experts: int = 4, layers: int = LAYERS, gated: bool = False
) -> Counts:
    """Operators of a micro-batch through `layers` blocks, with `num_experts_per_tok` 3 where an expert is shared."""
    config = MoeLayerConfig.model_validate(
        {"router": router, "num_experts": experts, "num_experts_per_tok": 2 + router.startswith("shared")}
    )
    state = RoutingState()
    blocks = nn.Sequential(*(_block(config, f"vision.{number}", state, gated) for number in range(layers))).bfloat16()
    state.competition_enabled = True
    state.competing = frozenset(block.name for block in blocks) if competing else frozenset()
    with fake_gpu():
        move_to_fake_gpu(blocks)
        x = torch.empty(2, 32, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        state.begin("vision", TokenGroups.from_mask(torch.ones(2, 32, device="cuda")))
        with OperatorCounts() as forward, state.recording():
            y = blocks(x)
        with OperatorCounts() as records:
            state.stacks = stack_layers(state.records)
            aux_losses, terms = routing_losses(state.stacks)
            StepMetrics(x.device).add_forward(terms, state.stacks)
        total = y.sum() + aux_losses["vision"]
        with OperatorCounts() as of_backward:
            backward(total)
    return Counts(forward.total, records.total, of_backward.total)


def _block(config: MoeLayerConfig, name: str, state: RoutingState, gated: bool) -> SparseMoeBlock:
    return SparseMoeBlock(
        config,
        name=name,
        state=state,
        hidden_size=16,
        intermediate_size=32,
        activation="silu" if gated else "gelu",
        gated=gated,
        bias=not gated,
    )


def main() -> None:
    print("| step | forward | records | backward | sum | sum, gated without biases |")
    print("| --- | --- | --- | --- | --- | --- |")
    for router, competing in (*((router, False) for router in ROUTERS), ("competition", True)):
        plain, gated = (_of_24_layers(router, competing, gated) for gated in (False, True))
        cells = " | ".join(f"{number / LAYERS:.1f}" for number in (*plain, sum(plain), sum(gated)))
        print(f"| {'competition step' if competing else router} | {cells} |")


def _of_24_layers(router: str, competing: bool, gated: bool) -> list[int]:
    two, three = (count(router, competing=competing, layers=layers, gated=gated) for layers in (2, 3))
    return [few + (LAYERS - 2) * (many - few) for few, many in zip(two, three, strict=True)]


if __name__ == "__main__":
    main()
