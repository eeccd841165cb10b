"""Which layers compete in which step: the only writer of `model.routing.competing` (CompeteSMoE, section 3.3).

Layers whose competition the loss judges at a rate of 1 are in no schedule: they ask in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train.trainer import StageTrainer


class CompetitionCallback(TrainerCallback):
    """Sets which layers compete in each optimizer step; the same on every rank, nothing of it is saved."""

    def __init__(self, trainer: StageTrainer, moe: MoeConfig | None) -> None:
        self.trainer = trainer
        self.moe = moe
        self.schedules: list[CompetitionSchedule] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.moe is None:
            return
        self.schedules = schedules(self.moe, list(moe_blocks(self.trainer.core_model)), self.trainer.plan.ends)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = self.layers_at(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = frozenset()

    def layers_at(self, step: int) -> frozenset[str]:
        """Names of the layers that compete in 0-based optimizer step `step`."""
        return frozenset().union(*(schedule.layers_at(step) for schedule in self.schedules))

    def count(self, steps: int) -> int:
        """How many of the first `steps` optimizer steps have a competing layer."""
        return sum(bool(self.layers_at(step)) for step in range(steps))


def schedules(moe: MoeConfig, names: Sequence[str], ends: Sequence[int]) -> list[CompetitionSchedule]:
    """One for the contests of those of the model's layers `names` that hold them, and one for each part whose layers
    ask in some steps only, for the loss to judge: without warm-up, as many in a step as draw it; `ends` as in
    `CompetitionSchedule.extended`."""
    by_part = {part: [name for name in names if name.split(".")[0] == part] for part in moe.parts()}
    contests = [name for part, config in moe.parts().items() if config.holds_contests for name in by_part[part]]
    found = []
    if contests:
        rules = (moe.competition_rate, moe.competition_warmup_ratio, moe.max_competing_layers)
        found.append(CompetitionSchedule.extended(moe.seed, ends, contests, *rules))
    for part, config in moe.parts().items():
        rate = config.competition_rate
        if rate is not None and rate < 1 and by_part[part]:
            found.append(CompetitionSchedule.extended(moe.seed, ends, by_part[part], rate, 0.0, len(by_part[part])))
    return found
