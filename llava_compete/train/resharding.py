"""Going on with another number of GPUs: DeepSpeed's universal checkpoint, made when it is needed.

ZeRO checkpoints hold one shard a rank. Rank 0 merges them into one file a tensor beside the shards, and DeepSpeed cuts
those anew. Model directory and trainer state stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import nn

from llava_compete.errors import UserError

logger = logging.getLogger(__name__)

LATEST = "latest_universal"


def convert(checkpoint: Path) -> None:
    """Write `global_step<n>_universal` into `checkpoint`, unless it is there; rank 0 only."""
    if (checkpoint / LATEST).is_file():
        return
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    logger.info("%s: merging the shards for another number of ranks", checkpoint.name)
    options = argparse.Namespace(
        input_folder=str(checkpoint / tag),
        output_folder=str(checkpoint / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint}: its shards cannot be merged: {' '.join(str(error).split())}") from error


def load_universal(sharding: Any) -> None:
    """Make DeepSpeed read the merged files; `sharding` is the Trainer's DeepSpeed config."""
    sharding.config.setdefault("checkpoint", {})["load_universal"] = True


@torch.no_grad()
def load_buffers(model: nn.Module, checkpoint: Path) -> None:
    """Give `model` the buffers of the run that wrote `checkpoint`: DeepSpeed reads parameters from merged files, and
    nothing else, so that a router's bias and a batch norm's statistics would begin anew.

    Raises:
        UserError: a buffer that is not there.
    """
    folder = checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip()
    stored: dict[str, Any] = {}
    # Of ZeRO-3 there is a file a rank; buffers are whole in each.
    for path in sorted(folder.glob("*_model_states.pt"))[:1]:
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in parameters or not isinstance(tensor, torch.Tensor):
            continue
        if name not in stored:
            raise UserError(f"{folder}: has no buffer {name}, which the model has")
        tensor.copy_(stored[name])


def mend_loaded_state(optimizer: Any, settings: Sequence[dict[str, Any]], rates: Sequence[float]) -> None:
    """Undo two slips of DeepSpeed 0.19's loading of merged files into a torch optimizer.

    Under ZeRO-3 all groups get one shared `step` tensor, which each group's update then counts up; and every group
    gets the first group's settings.

    Args:
        optimizer: the torch optimizer inside DeepSpeed's.
        settings: of each group as it was made, without `params`.
        rates: learning rate of each group now.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    for group, setting, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(setting, lr=rate)
