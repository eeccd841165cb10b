"""Is routing doing anything in this checkpoint? Loss and score with the router, and with its choices put out of action.

Each control takes the place of the router in all layers at once, when the checkpoint is run on answers that it should
give. Where a control does as well as the router, the experts are alike on these data or the choice among them does not
matter, and no comparison of routers will show a difference. Suffixes: T tokens, R routed experts, K chosen, C choices,
M positions before a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.block import SparseMoeBlock, competition_layers, moe_blocks
from llava_compete.moe.routers import Routing

Batch = dict[str, Tensor]
# What takes the place of a block's routing.
Control = Callable[[SparseMoeBlock, Routing], Routing]


class Score(NamedTuple):
    """loss: nats a token of the expected answers; exact: share of them that greedy decoding would write to the end."""

    loss: float
    exact: float


def measure_controls(model: Any, batches: Sequence[Batch], loads: dict[str, Tensor]) -> dict[str, Score]:
    """Score by control, the router itself first.

    Args:
        batches: inputs with labels, on the model's device.
        loads: by layer [E] how often the router chose each expert on these data.
    """
    generator = torch.Generator(model.device).manual_seed(0)
    controls: dict[str, Control | None] = {
        "router": None,
        "random": lambda block, routing: random_choice(block, routing, generator),
        "shifted": _shifted,
        "fixed": lambda block, routing: _fixed(block, routing, loads[block.name]),
        "mean_of_all": _mean_of_all,
    }
    found = {}
    for name, control in controls.items():
        with replaced_routing(model, control):
            found[name] = score(model, batches)
    if competition_layers(model):
        with competing(model):
            found["competition"] = score(model, batches)
    return found


@contextmanager
def replaced_routing(model: Any, control: Control | None) -> Iterator[None]:
    """Inside, `control` has the last word on every layer's routing."""

    def hook(block: SparseMoeBlock) -> Callable[[Any, Any, Routing], Routing]:
        return lambda _module, _inputs, routing: control(block, routing) if control else routing

    handles = [block.router.register_forward_hook(hook(block)) for block in moe_blocks(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def competing(model: Any) -> Iterator[None]:
    """Inside, every layer that can compete does."""
    before = model.config.competition_at_inference
    model.config.competition_at_inference = True
    try:
        yield
    finally:
        model.config.competition_at_inference = before


@torch.inference_mode()
def score(model: Any, batches: Sequence[Batch]) -> Score:
    """Loss and exact answers over all batches, tokens weighing alike."""
    nats, tokens, exact, rows = 0.0, 0, 0, 0
    for batch in batches:
        labels_BN, positions_M = batch["labels"], batch["label_positions"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits_MV = model(**inputs).logits[0].float()  # at the labels' positions alone
        expected_M = labels_BN.flatten()[positions_M + 1]
        nats += float(F.cross_entropy(logits_MV, expected_M, reduction="sum"))
        tokens += len(expected_M)
        wrong_M = logits_MV.argmax(-1) != expected_M
        rows += len(labels_BN)
        exact += len(labels_BN) - len((positions_M[wrong_M] // labels_BN.shape[1]).unique())
    return Score(nats / tokens, exact / rows)


def random_choice(block: SparseMoeBlock, routing: Routing, generator: torch.Generator) -> Routing:
    """K experts at random, with the router's weights."""
    draws_TR = torch.rand(routing.logits_TR.shape, generator=generator, device=routing.logits_TR.device)
    return _chosen(routing, draws_TR.topk(routing.choices_TC.shape[1]).indices)


def _shifted(block: SparseMoeBlock, routing: Routing) -> Routing:
    """The next expert in place of each choice: as uneven, as dependent on the token, and wrong."""
    return _chosen(routing, (routing.choices_TC + 1) % routing.logits_TR.shape[1])


def _fixed(block: SparseMoeBlock, routing: Routing, load_E: Tensor) -> Routing:
    """For all tokens the experts that the router chooses most often, with equal weights."""
    tokens, num_routed = routing.logits_TR.shape
    best_C = load_E[:num_routed].topk(routing.choices_TC.shape[1]).indices
    return _equal_weights(routing, best_C.expand(tokens, -1))


def _mean_of_all(block: SparseMoeBlock, routing: Routing) -> Routing:
    """The mean of the routed experts: the arithmetic of a dense model of their size, no choice at all.

    Of slots that are no expert there is nothing in it: an expert and the same with a minus would add up to 0.
    """
    num_experts, tokens = block.router.slots.num_experts - block.router.num_shared, len(routing.logits_TR)
    return _equal_weights(routing, torch.arange(num_experts, device=routing.logits_TR.device).expand(tokens, -1))


def _chosen(routing: Routing, experts_TC: Tensor) -> Routing:
    """The routing with other experts in place of the choices; a shared expert stays."""
    return routing._replace(choices_TC=experts_TC)


def _equal_weights(routing: Routing, experts_TX: Tensor) -> Routing:
    """Any number of experts that share the weight of the choices."""
    weights_TX = torch.full_like(experts_TX, 1 / experts_TX.shape[1], dtype=routing.weights_TC.dtype)
    return routing._replace(choices_TC=experts_TX, weights_TC=weights_TX)
