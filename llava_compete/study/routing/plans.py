"""What the routing study runs and in which order: its presets, as blocks of tasks, rules and learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llava_compete.study.routing.rules import EXPLORED, FIXED_EVENLY, RULES
from llava_compete.study.routing.tasks import TASKS, WIDE

_DEFAULT_RULES = (
    *("softmax", "published", "distil_only", "judge_all", "judge_c80", "judge_mean"),
    *("random", "dense_all", "dense_all_start"),
)
# Routers of other papers that have a result beside them.
_RIVALS = ("tc_moe", "moe_plus_plus", "autonomy", "coupled")
_FIRST_RULES = (*_DEFAULT_RULES, "judge_all_none", "judge_c50", "fixed", "dense_active")
_SECOND_RULES = tuple(name for name in RULES if name not in (*_FIRST_RULES, *EXPLORED, FIXED_EVENLY.name))
_SMALL = ("facts_8", "teacher_competition_1000")
_JUDGES = ("softmax", "judge_mean", "judge_c80", "judge_all")
_BEST = ("relative_c80", "mean_pair", "mean_near")
_FRESH = 100
_TEACHERS = tuple(name for name in TASKS if name.startswith("teacher"))


class Unit(NamedTuple):
    """The runs of one file: `times` is the learning rate as a multiple of the task's, `extra` percent more steps."""

    task: str
    rule: str
    times: float = 1.0
    extra: int = 0

    @property
    def steps(self) -> int:
        return round(TASKS[self.task].steps * (1 + self.extra / 100))

    def path(self, out: Path) -> Path:
        more = f"-steps+{self.extra}%" if self.extra else ""
        return out / "runs" / self.task / f"{self.rule}-x{self.times:g}{more}.json"


@dataclass(frozen=True)
class Plan:
    """Blocks of (tasks, rules, rates), most wanted first; `seeds` runs a unit from `first_seed` on, on bytes at most
    `byte_seeds`. `equal_arithmetic`: with softmax of as many more steps as a rule costs."""

    blocks: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]], ...]
    seeds: int
    byte_seeds: int = 8
    first_seed: int = 0
    equal_arithmetic: bool = True

    def units(self) -> Iterator[Unit]:
        """In order, each once."""
        listed = (
            Unit(task, rule, times)
            for tasks, rules, rates in self.blocks
            for task in tasks
            for rule in rules
            for times in rates
        )
        yield from dict.fromkeys(listed)

    def seeds_of(self, unit: Unit) -> list[int]:
        count = min(self.seeds, self.byte_seeds) if unit.task == "bytes" else self.seeds
        return list(range(self.first_seed, self.first_seed + count))


def default_plan(seeds: int = 10) -> Plan:
    """Facts of 8 tasks and the teacher that competes, 13 rules, one rate."""
    return Plan(((_SMALL, (*_DEFAULT_RULES, *_RIVALS), (1.0,)),), seeds)


def explore_plan(seeds: int = 5) -> Plan:
    """The tasks of the default, and all that was tried to make the judge better, at equal samples only."""
    rules = (*_JUDGES, *EXPLORED)
    return Plan(tuple(((task,), rules, (1.0,)) for task in _SMALL), seeds, equal_arithmetic=False)


def confirm_plan(seeds: int = 30) -> Plan:
    """What was best among the explored, on seeds that had no part in choosing it."""
    rules = ("softmax", "judge_c80", "judge_mean", *_BEST)
    return Plan(tuple(((task,), rules, (1.0,)) for task in reversed(_SMALL)), seeds, first_seed=_FRESH)


def full_plan(seeds: int = 30) -> Plan:
    """Every task and rule, three rates (two on bytes)."""
    facts, every = ("facts_8", "facts_24"), (*_FIRST_RULES, *_SECOND_RULES)
    return Plan(
        (
            (facts, _FIRST_RULES, (1.0,)),
            (_TEACHERS, _FIRST_RULES, (1.0,)),
            (("bytes", "facts_64"), _FIRST_RULES, (1.0,)),
            ((*facts, *_TEACHERS), _SECOND_RULES, (1.0,)),
            ((*facts, *_TEACHERS), every, (2.0, 3.0)),
            (("facts_64", "bytes"), every, (1.0, 2.0)),
            (("facts_64",), every, (3.0,)),
        ),
        seeds,
    )


def wide_plan(seeds: int = 30) -> Plan:
    """Small tasks with routers that start wide; scores of controls, on which a router's start has no bearing."""
    facts, large, teacher = (task.name for task in WIDE)
    controls = ("random", "fixed", FIXED_EVENLY.name, "dense_active", "dense_all_start")
    judges = ("published", "distil_only", *_JUDGES[1:], "judge_c50", "judge_next1")
    return Plan(
        (
            ((facts,), ("softmax", *judges, *controls), (1.0,)),
            ((teacher,), ("softmax", *judges), (1.0,)),
            ((large,), ("softmax", "published", *_JUDGES[1:]), (1.0,)),
        ),
        seeds,
        equal_arithmetic=False,
    )


def quick_plan() -> Plan:
    """Three rules and two seeds on the smallest task: whether a machine runs the study at all, and how fast."""
    return Plan(((("facts_8",), ("softmax", "published", "judge_c80"), (1.0,)),), 2)
