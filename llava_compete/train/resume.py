"""Where a run goes on: the checkpoint, what has changed since, and whether that is refused or obeyed. Rank 0 only."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import SchedulerType, TrainingArguments

from llava_compete.errors import UserError
from llava_compete.train import checkpoints
from llava_compete.train.checkpoints import step_of
from llava_compete.train.extension import Jump, Plan, Schedule, jump
from llava_compete.train.identity import EXPERT_PARALLEL, SPLIT, cannot_be_obeyed, differences

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """How a run begins.

    checkpoint: None at its very beginning.
    resharded: whether another number of ranks wrote it, or ranks among which experts were spread otherwise.
    expert_parallel: over how many ranks its experts were spread.
    plan: length, warm-up and competitions.
    changes: what was changed on the way, as (step, what), for the manifest and the next checkpoints.
    """

    checkpoint: Path | None
    resharded: bool
    plan: Plan
    changes: list[dict[str, Any]]
    expert_parallel: int = 1


def choose(
    output_dir: Path,
    identity: dict[str, Any],
    schedule: Schedule,
    total_steps: int,
    *,
    allow_changed: bool,
) -> Start:
    """The last sound checkpoint, if it may be gone on from.

    Raises:
        UserError: what has changed, with both values, unless `allow_changed`; what cannot be gone on from at all.
    """
    checkpoints.clear_staging(output_dir)
    sound = checkpoints.sound(output_dir)
    checkpoint = next(sound, None)
    if checkpoint is None:
        return Start(None, False, Plan.first(schedule.arguments, total_steps), [])
    plan, extension = Plan.of_record(checkpoints.mark(checkpoint)["plan"]), None
    if total_steps != plan.total_steps:
        plan = plan.extended(total_steps)
        checkpoint, extension = _without_jump(checkpoint, sound, schedule, plan)
        if step_of(checkpoint) > total_steps:  # whose weights would be the result of a run that asks for fewer
            raise UserError(
                f"{checkpoint}: has trained {step_of(checkpoint)} steps, found {total_steps} as the run's whole length "
                "(training.max_steps or num_train_epochs); expected as many or more, or choose another output_dir"
            )
    mark = checkpoints.mark(checkpoint)
    changed = check_identity(checkpoint, mark["identity"], identity, allow_changed=allow_changed)
    if "training.warmup_steps" in changed:
        plan = plan._replace(warmup_steps=schedule.arguments.get_warmup_steps(total_steps))
    if extension is not None:
        changed["total_steps"] = f"total_steps was {mark['plan']['total_steps']}, is {total_steps}: {extension}"
        if extension.is_one and not allow_changed:
            raise UserError(
                f"{checkpoint}: {changed['total_steps']}. Pass --allow-changed to go on with that jump; "
                "a constant rate, and warmup_stable_decay before its decay, go on without one"
            )
        logger.info("%s", changed["total_steps"])
    here = [{"step": step_of(checkpoint), "changed": list(changed.values())}] if changed else []
    changes = [*mark["changes"], *here]
    spread_over, now = (where.get(EXPERT_PARALLEL, 1) for where in (mark["identity"], identity))
    resharded = mark["identity"]["world_size"] != identity["world_size"] or spread_over != now
    return Start(checkpoint, resharded, plan, changes, spread_over)


def _without_jump(newest: Path, older: Iterator[Path], schedule: Schedule, plan: Plan) -> tuple[Path, Jump]:
    """A run of another length goes on from its newest checkpoint.

    With `warmup_stable_decay`, from the newest one before the decay if there is one: the decayed weights are a branch.
    """
    found = jump(newest, step_of(newest), schedule, plan)
    if found.is_one and schedule.arguments.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        for checkpoint in older:
            earlier = jump(checkpoint, step_of(checkpoint), schedule, plan)
            if step_of(checkpoint) >= plan.warmup_steps and not earlier.is_one:
                return checkpoint, earlier
    return newest, found


def check_identity(
    checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any], *, allow_changed: bool
) -> dict[str, str]:
    """Refuse to resume when a setting or the data changed, naming the keys, or when there is no state to resume.

    Returns:
        by key, what is obeyed although it changed.
    """
    if not (checkpoint / "scheduler.pt").is_file():
        raise UserError(
            f"{checkpoint}: holds the model alone (training.save_only_model): no optimizer or schedule to go on from. "
            f"{_weights_only(checkpoint)}"
        )
    changed = differences(saved, identity)
    changed.pop(EXPERT_PARALLEL, None)  # how the same weights are laid out
    if "zero_stage" in changed:
        raise UserError(
            f"{checkpoint}: written {_engine(saved)}, which a run {_engine(identity)} cannot read: "
            f"restore the key deepspeed. {_weights_only(checkpoint)}"
        )
    if "world_size" in changed and _global_batch(saved) == _global_batch(identity):
        changed = {key: text for key, text in changed.items() if key not in SPLIT}
    fixed = [text for key, text in changed.items() if cannot_be_obeyed(key)]
    if fixed:
        raise UserError(
            f"{checkpoint}: cannot go on, the run has changed: {'; '.join(fixed)}. Restore it. "
            f"{_weights_only(checkpoint)}"
        )
    if changed and not allow_changed:
        raise UserError(
            f"{checkpoint}: cannot go on, the run has changed: {'; '.join(changed.values())}. "
            "Restore it, pass --allow-changed, or choose another output_dir"
        )
    if changed:
        logger.warning("%s: going on although %s", checkpoint, "; ".join(changed.values()))
    return changed


def total_steps(arguments: TrainingArguments, batches: int) -> int:
    """Optimizer steps of the whole run, of an epoch of `batches` micro-batches on each rank; as the Trainer counts."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    steps = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * steps)


def _weights_only(checkpoint: Path) -> str:
    return f"Or train on from its weights alone: another output_dir, and model.checkpoint={checkpoint}"


def _engine(identity: dict[str, Any]) -> str:
    return f"with ZeRO-{identity['zero_stage']}" if identity["zero_stage"] else "without DeepSpeed"


def _global_batch(identity: dict[str, Any]) -> int:
    return math.prod(identity[key] for key in SPLIT)
