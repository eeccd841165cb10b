"""Which layers compete in which step: the only writer of `model.routing.competing` (CompeteSMoE, section 3.3)."""

from __future__ import annotations

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
        self.schedule: CompetitionSchedule | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.moe is None:
            return
        parts = self.moe.parts()
        names = [name for name in moe_blocks(self.trainer.core_model) if _competes(parts, name)]
        if names:
            self.schedule = CompetitionSchedule.extended(
                self.moe.seed,
                self.trainer.plan.ends,
                names,
                self.moe.competition_rate,
                self.moe.competition_warmup_ratio,
                self.moe.max_competing_layers,
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = self.layers_at(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.core_model.routing.competing = frozenset()

    def layers_at(self, step: int) -> frozenset[str]:
        """Names of the layers that compete in 0-based optimizer step `step`."""
        return self.schedule.layers_at(step) if self.schedule else frozenset()

    def count(self, steps: int) -> int:
        """How many of the first `steps` optimizer steps have a competing layer."""
        return sum(bool(self.layers_at(step)) for step in range(steps))


def _competes(parts: dict[str, Any], name: str) -> bool:
    return parts[name.split(".")[0]].router == "competition"
