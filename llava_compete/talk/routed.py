"""Which experts the tokens of one answer went to: recorded while it is written, and as shares of use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_compete.moe.block import moe_blocks
from llava_compete.moe.routers import Routing, by_weight


class RoutedTokens(NamedTuple):
    """Choices of one MoE block: experts [T, K] of the prompt's tokens (in tower and projector: of the pictures'
    patches) and [n, K] of the answer's, the one with the largest weight first; with some routers slots (slots.py)."""

    prompt_TK: Tensor
    answer_TK: Tensor
    num_experts: int


@contextmanager
def routing_recorded(model: Any) -> Iterator[dict[str, RoutedTokens]]:
    """Inside, one `generate` of one row; afterwards the dict has its choices by block name, in forward order.

    Empty for a model of None.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    blocks = {} if model is None else moe_blocks(model)
    for name, block in blocks.items():

        def record(_module: Any, _inputs: Any, routing: Routing, name: str = name) -> None:
            seen.setdefault(name, []).append(_ranked(routing))

        handles.append(block.router.register_forward_hook(record))
    found: dict[str, RoutedTokens] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, parts in seen.items():
            # The first forward takes the prompt whole, each later one the token written last.
            answer_TK = torch.cat(parts[1:]) if len(parts) > 1 else parts[0][:0]
            found[name] = RoutedTokens(parts[0].cpu(), answer_TK.cpu(), blocks[name].num_slots)


def _ranked(routing: Routing) -> Tensor:
    return by_weight(routing.selected_experts_TK, routing.routing_weights_TK)[0]


def expert_use(routed: dict[str, RoutedTokens], image_places_T: Tensor) -> dict[str, dict[str, list[float]]]:
    """By block and kind of token (image, question, answer): each expert's share of the choices; sums to 1.

    image_places_T: where in the prompt a picture's features stand.
    """
    use: dict[str, dict[str, list[float]]] = {}
    for name, tokens in routed.items():
        kinds = {"image": tokens.prompt_TK}
        if name.startswith("language."):
            kinds = {
                "image": tokens.prompt_TK[image_places_T],
                "question": tokens.prompt_TK[~image_places_T],
                "answer": tokens.answer_TK,
            }
        use[name] = {
            kind: (torch.bincount(chosen.flatten(), minlength=tokens.num_experts) / chosen.numel()).tolist()
            for kind, chosen in kinds.items()
            if chosen.numel()
        }
    return use
