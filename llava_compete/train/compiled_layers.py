"""Regional compilation (`training.torch_compile: layers`): each layer of tower and language model by itself.

What stands between layers (pictures into their places, records, losses) then cannot break a graph, and a layer whose
step changes its kind, because it competes, is compiled anew alone. A router step is one graph; questions of the loss's
judgement and competitions that are computed again run outside (`torch.compiler.disable`). Parameters keep their names.
"""

from __future__ import annotations

from typing import Any

import torch._dynamo
from accelerate.utils.other import is_repeated_blocks
from torch import nn

from llava_compete.errors import UserError

# Kinds of step and of shapes that a layer may meet; torch counts all layers' together, for they share their code.
GRAPHS_A_LAYER = 8


def refuse_zero_3(stage: int) -> None:
    """`UserError` under ZeRO-3, whose gathers by hook would be part of the graphs."""
    if stage == 3:
        raise UserError("training.torch_compile: found layers under ZeRO-3, expected true or false, or ZeRO-2 or less")


def compile_layers(model: nn.Module, backend: str | None, mode: str | None) -> list[nn.Module]:
    """Compile every layer in place; returns them."""
    layers = [layer for stack in model.modules() if is_repeated_blocks(stack) for layer in _outermost(stack, model)]
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_A_LAYER * len(layers))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    for layer in layers:
        layer.compile(backend=backend or "inductor", mode=mode)
    return layers


def _outermost(stack: Any, model: nn.Module) -> list[nn.Module]:
    """The stack's layers, unless it lies inside another stack's."""
    others = (other for other in model.modules() if other is not stack and is_repeated_blocks(other))
    inside = any(stack in set(other.modules()) for other in others)
    return [] if inside else list(stack)
