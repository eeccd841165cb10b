"""Going on with experts spread over another number of ranks: the shards of ZeRO-1 or 2 merged, experts whole.

DeepSpeed's own conversion takes all ranks' pieces of a tensor for pieces of one. Of experts that are spread, each rank
of a group has its own; ranks of one place in their groups have pieces of the same. What is written is DeepSpeed's
universal checkpoint, one file a tensor and state, which it cuts anew for any number of ranks and of experts on each.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    EP_IS_EXPERT_PARAM,
    EP_NUM_EXPERTS,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from llava_compete.errors import UserError
from llava_compete.train.resharding import LATEST

logger = logging.getLogger(__name__)

MODEL_STATES = "mp_rank_00_model_states.pt"
# DeepSpeed reads as many groups as the file names; their settings are set anew afterwards. More than a run has.
_GROUPS = 64


def merge_experts(checkpoint: Path, num_experts: Mapping[str, int], expert_parallel: int) -> None:
    """Write `global_step<n>_experts` into `checkpoint`, unless it is there; rank 0 only.

    Args:
        num_experts: of each expert parameter, by name; what its first dimension is when it is whole.
        expert_parallel: over how many ranks they were spread.

    Raises:
        UserError: shards that are not there or do not fit.
    """
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    target, partial = checkpoint / f"{tag}_experts", checkpoint / f"{tag}_experts.partial"
    latest = checkpoint / LATEST
    if not target.is_dir():
        logger.info("%s: merging the shards for experts on other ranks", checkpoint.name)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _merge(checkpoint / tag, partial, num_experts, expert_parallel)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"{checkpoint}: its shards cannot be merged: {' '.join(str(error).split())}") from error
        partial.rename(target)
    latest.write_text(target.name, encoding="utf-8")


def _merge(folder: Path, target: Path, num_experts: Mapping[str, int], expert_parallel: int) -> None:
    shards = [_read(path)[OPTIMIZER_STATE_DICT] for path in _shard_files(folder)]
    by_group = sorted(range(len(shards)), key=lambda rank: (rank % expert_parallel, rank // expert_parallel))
    (target / "zero").mkdir(parents=True)
    for group, shapes in enumerate(_read(folder / MODEL_STATES)[PARAM_SHAPES]):
        for name, shape in shapes.items():
            experts = num_experts.get(name)
            ranks = range(len(shards)) if experts is None else by_group
            whole = tuple(shape) if experts is None else (experts, *tuple(shape)[1:])
            marks = {} if experts is None else {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: experts}
            path = target / "zero" / name
            path.mkdir()
            for key, pieces in _pieces([shards[rank] for rank in ranks], group, name).items():
                if key == "step":
                    torch.save(pieces[0], path / "step.pt")
                else:
                    torch.save({PARAM: torch.cat(pieces).reshape(whole), **marks}, path / f"{key}.pt")
    left_out = {BASE_OPTIMIZER_STATE, PARAM_SLICE_MAPPINGS, SINGLE_PARTITION_OF_FP32_GROUPS}
    rest = {key: value for key, value in shards[0].items() if key not in left_out}
    torch.save({**rest, PARAM_GROUPS: [{"params": []}] * _GROUPS}, target / "zero" / "optimizer_state.pt")
    shutil.copy2(folder / MODEL_STATES, target)


def _pieces(shards: list[dict[str, Any]], group: int, name: str) -> dict[str, list[Any]]:
    """By state, the pieces of one tensor in order; a rank may have none."""
    found: dict[str, list[Any]] = {}
    for shard in shards:
        piece = shard[PARAM_SLICE_MAPPINGS][group].get(name)
        if piece is None:
            continue
        states = {"fp32": shard[SINGLE_PARTITION_OF_FP32_GROUPS][group]}
        states |= shard[BASE_OPTIMIZER_STATE]["state"].get(group, {})
        for key, value in states.items():
            is_flat = isinstance(value, Tensor) and value.ndim == 1
            found.setdefault(key, []).append(value.narrow(0, piece.start, piece.numel) if is_flat else value)
    return found


def _shard_files(folder: Path) -> list[Path]:
    def rank(path: Path) -> int:
        return int(path.name.partition("zero_pp_rank_")[2].partition("_")[0])

    files = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=rank)
    if [rank(path) for path in files] != list(range(len(files))) or not files:
        raise ValueError(f"{folder}: found shards {[path.name for path in files]}, expected one of each rank from 0")
    return files


def _read(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, on disk until it is used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
