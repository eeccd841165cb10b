"""A run that is made longer or shorter: no second warm-up, and no jump of the learning rate without a word.

The steps of the warm-up and the competitions of the first plan stay; what is added competes by a plan of its own that
has no warm-up. Rates are those of the schedule over the new length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments, get_scheduler

SCHEDULER = "scheduler.pt"
# Relative; rates are computed in another order after a resume.
_SAME = 1e-9


class Schedule(NamedTuple):
    """Learning rates as the config says now: the Trainer's schedule, and the base rates of the optimizer's groups."""

    arguments: TrainingArguments
    base_rates: list[float]


class Plan(NamedTuple):
    """How long a run is, its warm-up, and where each of the plans that it was made of ends (in optimizer steps)."""

    total_steps: int
    warmup_steps: int
    ends: tuple[int, ...]

    @classmethod
    def first(cls, arguments: TrainingArguments, total_steps: int) -> Plan:
        """Of a run that starts."""
        return cls(total_steps, arguments.get_warmup_steps(total_steps), (total_steps,))

    def extended(self, total_steps: int) -> Plan:
        """The same run, ended elsewhere; shortened, it competes where it would have."""
        longer = () if total_steps <= self.ends[-1] else (total_steps,)
        return Plan(total_steps, self.warmup_steps, self.ends + longer)

    @classmethod
    def of_record(cls, content: Mapping[str, Any]) -> Plan:
        """From a checkpoint's mark, where it is `_asdict()`."""
        return cls(content["total_steps"], content["warmup_steps"], tuple(content["ends"]))


class Jump(NamedTuple):
    """Learning rates of the groups for the next step, by the old plan and by the new one."""

    step: int
    before: list[float]
    after: list[float]

    @property
    def is_one(self) -> bool:
        """Whether any rate is another."""
        if len(self.before) != len(self.after):  # other parts train, which is refused for itself
            return True
        pairs = zip(self.before, self.after, strict=True)
        return any(abs(one - other) > _SAME * max(abs(one), abs(other)) for one, other in pairs)

    def __str__(self) -> str:
        rates = f"{_rates(self.after)}, by the plan so far {_rates(self.before)}"
        return f"the learning rate of step {self.step + 1} is {rates}"


def jump(checkpoint: Path, step: int, schedule: Schedule, plan: Plan) -> Jump:
    """What going on from `checkpoint` (written after `step` steps) by `plan` does to the learning rates."""
    before = torch.load(checkpoint / SCHEDULER, weights_only=True)["_last_lr"]
    return Jump(step, list(before), rates_at(step, schedule, plan))


def rates_at(step: int, schedule: Schedule, plan: Plan) -> list[float]:
    """Rates of the groups for the step after the first `step` ones, by the Trainer's own schedules."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in schedule.base_rates]
    scheduler = get_scheduler(
        schedule.arguments.lr_scheduler_type,
        torch.optim.SGD(groups, lr=schedule.arguments.learning_rate),  # of which a lowest rate is a share
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.total_steps,
        scheduler_specific_kwargs=dict(schedule.arguments.lr_scheduler_kwargs or {}),
    )
    return [base * shape(step) for base, shape in zip(schedule.base_rates, scheduler.lr_lambdas, strict=True)]


def load_schedule(scheduler: Any, checkpoint: Path, groups: int) -> None:
    """The schedule's state of a checkpoint, also where experts that were spread over ranks, or are now, make it another
    number of groups; their rates are set anew (`set_rates`)."""
    state = torch.load(checkpoint / SCHEDULER, weights_only=True)
    state["lr_lambdas"] = (state["lr_lambdas"] * groups)[:groups]  # one schedule for all
    scheduler.load_state_dict(state)


def set_rates(scheduler: Any, base_rates: Sequence[float]) -> list[float]:
    """Give a scheduler that was loaded from a checkpoint the base rates of now; returns the rates of the next step."""
    scheduler.base_lrs = list(base_rates)
    rates = [base * shape(scheduler.last_epoch) for base, shape in zip(base_rates, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    return rates


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates))
