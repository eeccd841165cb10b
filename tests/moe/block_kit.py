"""Small MoE blocks and one forward and backward of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.records import RoutingRecord
from llava_compete.moe.state import RoutingState, TokenGroups

SIZES = {"hidden_size": 12, "intermediate_size": 20, "activation": "gelu", "gated": False, "bias": True}


def make_block(seed: int = 0, sizes: dict[str, Any] | None = None, **config: Any) -> SparseMoeBlock:
    """A block "language.0" with weights large enough to tell experts apart."""
    torch.manual_seed(seed)
    layer = MoeLayerConfig.model_validate({"num_experts": 4, "num_experts_per_tok": 2, **config})
    block = SparseMoeBlock(layer, name="language.0", state=RoutingState(), **{**SIZES, **(sizes or {})})
    with torch.no_grad():
        for parameter in block.router.parameters():
            parameter.mul_(3 if block.router.factorises else 20)  # of norms, which are large already
    return block


class Step(NamedTuple):
    output: Tensor
    record: RoutingRecord
    grads: dict[str, Tensor]


def run_step(
    block: SparseMoeBlock, x: Tensor, mask: Tensor | None = None, competing: bool = False, through: Any = None
) -> Step:
    """Forward and backward of mean output square + 100 x auxiliary loss; `through` wraps the call of the block."""
    state = block.state
    state.competition_enabled = True
    state.competing = frozenset({block.name}) if competing else frozenset()
    mask = torch.ones(x.shape[:2]) if mask is None else mask
    x = x.clone().requires_grad_()
    block.zero_grad()
    state.begin("language", TokenGroups.from_mask(mask))
    with state.recording():
        output = through(block, x) if through else block(x)
    record = state.records[block.name]
    ((output.float().square().sum(-1) * mask).mean() + 100 * record.aux_loss).backward()
    grads = {name: p.grad.clone() for name, p in block.named_parameters() if p.requires_grad}
    return Step(output.detach(), record, {**grads, "x": x.grad})


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative error over named tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)) for name in ours)
