"""Expert parallelism in a stage (`moe.expert_parallel`): what is refused, and what DeepSpeed must be told.

DeepSpeed's groups: N neighbouring ranks hold all experts between them, and the ranks of one place in these hold copies,
over which ZeRO-1 and 2 reduce the experts' gradients and spread their optimizer's states. It divides both kinds of
gradients by the number of all ranks, so the loss is scaled as it always is, and takes one norm over all experts and all
else. Between `mark` and `spread` models are whole: what counts, plans and describes parameters works as elsewhere.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from llava_compete.errors import UserError
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.experts import PackedExperts
from llava_compete.moe.parallel import ExpertRanks


def size_of(moe: MoeConfig | None) -> int:
    """Ranks over which experts are spread; 1 where they are not."""
    return 1 if moe is None else moe.expert_parallel


def check(moe: MoeConfig | None, world_size: int, zero_stage: int, *, adapted: bool) -> None:
    """Refuse what cannot be spread.

    Args:
        zero_stage: 0 without DeepSpeed.
        adapted: whether the model has adapters.

    Raises:
        UserError: naming the key.
    """
    size = size_of(moe)
    if size == 1:
        return
    if world_size % size:
        raise UserError(f"moe.expert_parallel: found {size}, expected a divisor of the number of ranks, {world_size}")
    if zero_stage not in (1, 2):
        engine = f"zero{zero_stage}" if zero_stage else "null"
        raise UserError(
            f"deepspeed: found {engine} beside moe.expert_parallel {size}, expected zero1 or zero2: "
            + ("ZeRO-3 spreads the experts by itself" if zero_stage else "it reduces the experts' gradients")
        )
    if adapted:
        raise UserError(
            f"moe.expert_parallel: found {size} beside adapters (trainable: lora), expected parts that train in full "
            "or are frozen; leave it out, for adapters need little memory"
        )


def group_name(size: int) -> str:
    """DeepSpeed's name for the groups of so many ranks."""
    return f"ep_size_{size}"


def mark(model: nn.Module, size: int) -> None:
    """Say of each expert's parameter that its gradient is not reduced over all ranks (DeepSpeed's convention)."""
    for experts in _packed(model).values() if size > 1 else ():
        parameter: Any  # takes attributes
        for parameter in experts.parameters():
            parameter.allreduce, parameter.group_name = False, group_name(size)


def spread(model: nn.Module, size: int) -> None:
    """Keep this rank's experts alone; on the CPU, before DeepSpeed takes the model. All ranks call it."""
    if size == 1:
        return
    deepspeed.init_distributed()  # takes the group that there is
    groups._create_expert_and_data_parallel(size)
    for experts in _packed(model).values():
        experts.spread(ExpertRanks(experts.num_experts, groups._get_expert_parallel_group(group_name(size))))
    mark(model, size)
    if any(p.requires_grad for experts in _packed(model).values() for p in experts.parameters()):
        model.add_module("spread_experts", _Sign(size))


class _Sign(MoE):
    """By finding a module of this class DeepSpeed knows that a model has expert groups. It has nothing of its own."""

    def __init__(self, size: int) -> None:
        nn.Module.__init__(self)
        self.expert_group_name, self.num_experts, self.num_local_experts = group_name(size), size, 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are there already."""


def expert_names(model: nn.Module) -> dict[str, int]:
    """The experts' parameters by name, and each one's number of experts in all."""
    return {
        f"{path}.{name}": experts.num_experts
        for path, experts in _packed(model).items()
        for name, _ in experts.named_parameters(recurse=False)
    }


def refresh(engine: Any) -> None:
    """After a resume: the weights from the optimizer's own copies, since the file of weights leaves experts out."""
    engine.optimizer.update_lp_params()


def _packed(model: nn.Module) -> dict[str, PackedExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}
