"""Which tensors train, and how: the one place that sets `requires_grad` and makes optimizer groups.

The stage's `trainable:` map names the parts (vision, projector, language); `apply` freezes or frees their tensors,
`optimizer_groups` gives every trainable tensor exactly one group, `table` says it in words for console and manifest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

from torch import nn

from llava_compete import parts
from llava_compete.errors import UserError
from llava_compete.moe.block import SparseMoeBlock, moe_blocks
from llava_compete.moe.terms import COMPETITION_COEFS, ROUTER_COEFS
from llava_compete.parts import Part
from llava_compete.train.config import PartTraining


class PartRow(NamedTuple):
    """One line of the trainable table; counts are in tensors and in numbers."""

    part: Part
    mode: str
    tensors: int
    parameters: int
    trainable_tensors: int
    trainable_parameters: int
    learning_rate: float
    weight_decay: float


def part_of(name: str) -> Part:
    """The part of a parameter, by its name in the model or in peft's wrapper of it."""
    return parts.part_of(name.removeprefix("base_model.model."))


def apply(model: nn.Module, trainable: Mapping[Part, PartTraining]) -> None:
    """Set `requires_grad` of every parameter; a part that is not named is frozen.

    In a part that trains by LoRA the routers train in full: upcycling left them random, adapters would leave them so.

    Raises:
        UserError: a named part has no parameters in this model, or a frozen one has losses of its own.
    """
    found = {part_of(name) for name, _ in model.named_parameters()}
    for part in trainable:
        if part not in found:
            raise UserError(f"trainable.{part}: the model has no {part} part; it has {', '.join(sorted(found))}")
    blocks = moe_blocks(model).values()
    for block in blocks:
        if _setting(trainable, cast(Part, block.part)).mode == "frozen":
            _refuse_losses(block)
    routers = {id(parameter) for block in blocks for parameter in block.router.parameters()}
    for name, parameter in model.named_parameters():
        mode = _setting(trainable, part_of(name)).mode
        adapted = "lora_" in name or id(parameter) in routers
        parameter.requires_grad_(mode == "full" or (mode == "lora" and adapted))


def _refuse_losses(block: SparseMoeBlock) -> None:
    """A loss whose own parameters are frozen is computed, paid for and trains nothing."""
    set_keys = [key for key in (*ROUTER_COEFS, *COMPETITION_COEFS) if getattr(block.config, key)]
    if set_keys:
        raise UserError(
            f"trainable.{block.part}: frozen, so that nothing learns from the losses of its routers; train the part, "
            f"or set moe.{block.part}'s {', '.join(set_keys)} to 0"
        )


def optimizer_groups(
    model: nn.Module,
    trainable: Mapping[Part, PartTraining],
    *,
    learning_rate: float,
    weight_decay: float,
    decayed: Collection[str],
) -> list[dict[str, Any]]:
    """Groups for torch optimizers, one for each (part, decayed or not) that has tensors, and further ones for experts
    that are spread over ranks: DeepSpeed finds theirs by "moe" and by "name", which all of them share.

    Args:
        model: parameters already frozen or freed by `apply`.
        trainable: the stage's map.
        learning_rate, weight_decay: of the parts that set none.
        decayed: names that weight decay applies to (no biases, no norms).
    """
    groups: dict[tuple[Part, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decays = part_of(name), name in decayed
        spread = not getattr(parameter, "allreduce", True)  # DeepSpeed's word for it
        setting = _setting(trainable, part)
        label = f"{part}{'/experts' if spread else ''}{'' if decays else '/no_decay'}"
        group = groups.setdefault(
            (part, decays, spread),
            {
                **(_of_experts(parameter, label) if spread else {"name": label}),
                "params": [],
                "lr": learning_rate if setting.learning_rate is None else setting.learning_rate,
                "weight_decay": _decay(setting, weight_decay) if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def table(
    model: nn.Module, trainable: Mapping[Part, PartTraining], *, learning_rate: float, weight_decay: float
) -> list[PartRow]:
    """The resolved table, one row for each part of the model."""
    rows = []
    named = [(part_of(name), parameter) for name, parameter in model.named_parameters()]
    for part in parts.PARTS:
        parameters = [parameter for owner, parameter in named if owner == part]
        if not parameters:
            continue
        free = [parameter for parameter in parameters if parameter.requires_grad]
        setting = _setting(trainable, part)
        rate = learning_rate if setting.learning_rate is None else setting.learning_rate
        rows.append(
            PartRow(
                part,
                setting.mode,
                len(parameters),
                sum(map(_numel, parameters)),
                len(free),
                sum(map(_numel, free)),
                rate if free else 0.0,
                _decay(setting, weight_decay) if free else 0.0,
            )
        )
    return rows


def describe(row: PartRow) -> str:
    """One console line for a row."""
    if not row.trainable_tensors:
        return f"  {row.part:<10} frozen  {row.parameters:>14,} parameters"
    return (
        f"  {row.part:<10} {row.mode:<6}  {row.trainable_parameters:>14,} of {row.parameters:,} parameters "
        f"({row.trainable_tensors} tensors), learning rate {row.learning_rate:g}, weight decay {row.weight_decay:g}"
    )


def _setting(trainable: Mapping[Part, PartTraining], part: Part) -> PartTraining:
    return trainable.get(part) or PartTraining(mode="frozen")


def _decay(setting: PartTraining, default: float) -> float:
    return default if setting.weight_decay is None else setting.weight_decay


def _of_experts(parameter: Any, label: str) -> dict[str, Any]:
    return {"name": parameter.group_name, "moe": True, "label": label}


def _numel(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter's own tensor is empty; DeepSpeed keeps the true count beside it.
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
