"""A stage that has finished: with which settings, and whether the command at hand asks for more. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_compete.data.source_files import SourceError
from llava_compete.errors import UserError
from llava_compete.model.checkpoint import read_config
from llava_compete.moe.config import MoeConfig
from llava_compete.train import checkpoints
from llava_compete.train.config import TrainConfig
from llava_compete.train.identity import contents, contents_in, differences, settings
from llava_compete.train.starting_point import moe_settings

logger = logging.getLogger(__name__)


def record(config: TrainConfig, moe: MoeConfig | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What `run/finished.json` says of how the stage was run; `moe` are the settings in force.

    The data are those that it began with: by its end they may be others.
    """
    return {"settings": settings(config, moe), "data": contents_in(identity), "length": _length(config)}


def has_finished(config: TrainConfig, *, allow_changed: bool) -> bool:
    """Whether nothing is left to do: the stage has finished with these settings and data, and is not made longer.

    Raises:
        UserError: the directory holds the model of another stage, or of this one with other settings or data.
    """
    if (config.output_dir / "config.json").is_file():
        stage = read_config(config.output_dir).stage
        if stage != config.stage:
            raise UserError(
                f"{config.output_dir}: holds the model of stage {stage!r}, found stage {config.stage!r}; "
                "choose another output_dir"
            )
    finished = checkpoints.read_finished(config.output_dir)
    if finished is None:
        return False
    parent = config.model.checkpoint
    if "settings" not in finished or (parent is not None and not Path(parent).exists()):
        return True  # of an earlier version, or its parent is gone: nothing to compare with
    changed = differences(finished["settings"], settings(config, moe_settings(config)))
    if "data" in finished and not changed:
        changed = differences(finished["data"], _contents_now(config, finished["data"]))
    if changed and not allow_changed:
        raise UserError(
            f"{config.output_dir}: stage {config.stage} has finished with other settings or data: "
            f"{'; '.join(changed.values())}. Restore them, or choose another output_dir"
        )
    return not changed and finished["length"] == _length(config)


def _contents_now(config: TrainConfig, recorded: dict[str, str]) -> dict[str, str]:
    try:
        return contents(config.data)
    except SourceError as error:
        logger.warning("%s: not compared with the data that it was trained on: %s", config.output_dir, error)
        return recorded


def refuse_to_begin_again(config: TrainConfig) -> None:
    """A finished stage that is made longer needs a checkpoint; without one it would be trained anew over its result."""
    if checkpoints.read_finished(config.output_dir) is not None:
        raise UserError(
            f"{config.output_dir}: stage {config.stage} has finished, and no checkpoint is left to go on from; "
            "choose another output_dir"
        )


def _length(config: TrainConfig) -> list[float | None]:
    return [config.training.max_steps, config.training.num_train_epochs]
