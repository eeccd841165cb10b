"""What the choice of experts is worth layer by layer, and how alike the experts are.

A layer whose router matters loses when its choices alone are drawn at random; experts that are alike have weights and
outputs that point the same way, and then no router can matter. Right after upcycling all cosines are 1.
Suffixes: T tokens, D width, E experts, R routed ones, M positions before a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.evaluation.routing_controls import Batch, random_choice, replaced_routing
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.factorised import FactorisedExperts
from llava_compete.moe.routers import Routing

# Tokens of a layer on which outputs are compared.
COMPARED_TOKENS = 256


class Worth(NamedTuple):
    """One layer routed at random, the others as they are: mean over the labels' tokens of the loss minus that with the
    router (nats), and the share of draws in which a token's loss is lower than with the router."""

    regret: float
    lower: float


class Likeness(NamedTuple):
    """Mean cosine of two experts: of their weights, and of their outputs on tokens that the layer met. `weights_EE`,
    `outputs_EE`: by pair."""

    weights: float
    outputs: float
    weights_EE: list[list[float]]
    outputs_EE: list[list[float]]


@torch.inference_mode()
def measure_worth(model: Any, batches: Sequence[Batch], draws: int = 2) -> dict[str, Worth]:
    """By layer what its choices are worth, from `draws` random choices of every token."""
    usual = [_token_losses(model, batch) for batch in batches]
    found = {}
    generator = torch.Generator(model.device).manual_seed(0)
    for name in moe_blocks(model):

        def control(block: SparseMoeBlock, routing: Routing, name: str = name) -> Routing:
            return random_choice(block, routing, generator) if block.name == name else routing

        more, lower, tokens = 0.0, 0, 0
        with replaced_routing(model, control):
            for batch, usual_M in zip(batches, usual, strict=True):
                for _ in range(draws):
                    change_M = _token_losses(model, batch) - usual_M
                    more += float(change_M.sum())
                    lower += int((change_M < 0).sum())
                    tokens += len(change_M)
        found[name] = Worth(more / tokens, lower / tokens)
    return found


@torch.inference_mode()
def measure_likeness(model: Any, batch: Batch) -> dict[str, Likeness]:
    """By layer how alike its experts are; outputs on the batch's first COMPARED_TOKENS counted tokens."""
    blocks = moe_blocks(model)
    met: dict[str, Tensor] = {}

    def keep(block: SparseMoeBlock) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            counted_T = block.state.groups[block.part].counted_T > 0
            met[block.name] = inputs[0][counted_T][:COMPARED_TOKENS]

        return block.experts.register_forward_hook(hook)

    handles = [keep(block) for block in blocks.values()]
    try:
        model(**{key: value for key, value in batch.items() if key != "labels"}, output_routing=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _likeness(blocks[name], x_TD) for name, x_TD in met.items()}


def _likeness(block: SparseMoeBlock, x_TD: Tensor) -> Likeness:
    experts, routing = block.experts, block.router(x_TD)
    weights_EX = torch.cat([matrix.float().flatten(1) for matrix in _matrices(block)], dim=1)
    outputs = []
    for expert in range(experts.num_experts):
        alone_T1 = torch.full((len(x_TD), 1), expert, device=x_TD.device)
        ones_T1 = torch.ones_like(alone_T1, dtype=torch.float32)
        outputs.append(experts(x_TD, alone_T1, ones_T1, **routing.begun).float())
    y_TEO = F.normalize(torch.stack(outputs, dim=1), dim=-1)
    weights_EE = F.normalize(weights_EX, dim=-1) @ F.normalize(weights_EX, dim=-1).T
    outputs_EE = torch.einsum("teo,tfo->ef", y_TEO, y_TEO) / max(len(x_TD), 1)
    return Likeness(_between(weights_EE), _between(outputs_EE), _rounded(weights_EE), _rounded(outputs_EE))


def _matrices(block: SparseMoeBlock) -> list[Tensor]:
    """Of all experts, [E, out, in]; a factorised projection as the product, which does not depend on how it is cut."""
    experts = block.experts
    if not isinstance(experts, FactorisedExperts):
        return [experts.up, experts.down_proj]
    first_EID = experts.high.float() @ block.router.get_parameter("low_proj").float()
    return [first_EID, *([experts.up] if experts.has_gate else []), experts.down_proj]


def _between(cosines_EE: Tensor) -> float:
    """Mean over pairs of different experts."""
    count = len(cosines_EE)
    return float((cosines_EE.sum() - cosines_EE.diagonal().sum()) / (count * (count - 1)))


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in matrix.tolist()]


def _token_losses(model: Any, batch: Batch) -> Tensor:
    """Loss of each label's token, [M]."""
    positions_M = batch["label_positions"]
    logits_MV = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0].float()
    return F.cross_entropy(logits_MV, batch["labels"].flatten()[positions_M + 1], reduction="none")
