"""Which runs the study has, in which order, and the files that keep them: one a rule, task, rate and number of steps.

What is there is not trained again, so a study that was stopped goes on, and one with more seeds adds them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from llava_compete.errors import UserError
from llava_compete.files import read_json, write_json
from llava_compete.study.routing.rules import EXPLORED, RULES
from llava_compete.study.routing.tasks import TASKS, Task
from llava_compete.study.routing.training import train

logger = logging.getLogger(__name__)
_DEFAULT_RULES = (
    *("softmax", "published", "distil_only", "judge_all", "judge_c80", "judge_mean"),
    *("random", "dense_all", "dense_all_start"),
)
# Routers of other papers that have a result beside them.
_RIVALS = ("tc_moe", "moe_plus_plus", "autonomy", "coupled")
_FIRST_RULES = (*_DEFAULT_RULES, "judge_all_none", "judge_c50", "fixed", "dense_active")
_SECOND_RULES = tuple(name for name in RULES if name not in (*_FIRST_RULES, *EXPLORED))
_SMALL = ("facts_8", "teacher_competition_1000")
_JUDGES = ("softmax", "judge_mean", "judge_c80", "judge_all")
_BEST = ("relative_c80", "mean_pair", "mean_near")
_FRESH = 100
_TEACHERS = tuple(name for name in TASKS if name.startswith("teacher"))
# A price is met by so many more steps, to a whole percent; below this it is none.
_LEAST_PRICE = 0.005
_TIMED_STEPS = 4


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
            ((*facts, *_TEACHERS), _SECOND_RULES, (1.0,)),
            (("facts_64", "bytes"), _FIRST_RULES, (1.0,)),
            ((*facts, *_TEACHERS), every, (2.0, 3.0)),
            (("facts_64", "bytes"), every, (1.0, 2.0)),
            (("facts_64",), every, (3.0,)),
        ),
        seeds,
    )


def quick_plan() -> Plan:
    """Two rules and seeds on the smallest task: whether a machine runs the study at all, and how fast."""
    return Plan(((("facts_8",), ("softmax", "published", "judge_c80"), (1.0,)),), 2)


def estimated_hours(plan: Plan, out: Path, device: str) -> float:
    """Of what is missing, from a few steps of each task on this machine; the equal arithmetic adds about a third."""
    seconds = 0.0
    pace: dict[str, float] = {}
    for unit in plan.units():
        missing = _missing(unit, plan, out)
        if not missing:
            continue
        if unit.task not in pace:
            pace[unit.task] = _seconds_a_run(TASKS[unit.task], device)
        seconds += len(missing) * pace[unit.task]
    return 4 / 3 * seconds / 3600


def _seconds_a_run(task: Task, device: str) -> float:
    runs = task.together if device == "cpu" else 30
    for steps in (1, _TIMED_STEPS):  # the first warms up
        started = time.perf_counter()
        train(task, RULES["judge_c80"], range(runs), [task.rate] * runs, steps, device)
        spent = time.perf_counter() - started
    return spent / runs / _TIMED_STEPS * task.steps


def run(plan: Plan, out: Path, device: str, minutes: float | None = None) -> bool:
    """Train what is missing; False where the `minutes` ended before the plan."""
    units = list(plan.units())
    total = sum(len(_missing(unit, plan, out)) * unit.steps for unit in units)
    ends = time.monotonic() + 60 * minutes if minutes is not None else None
    with tqdm(total=total, unit="step", unit_scale=True, desc="routing") as bar:
        for unit in units:
            if not _do(unit, plan, out, device, bar, ends):
                return False
            more = equal_arithmetic(unit, out) if plan.equal_arithmetic else None
            if more is None:
                continue
            bar.total = (bar.total or 0) + len(_missing(more, plan, out)) * more.steps
            if not _do(more, plan, out, device, bar, ends):
                return False
    return True


def equal_arithmetic(unit: Unit, out: Path) -> Unit | None:
    """Softmax with as many more steps as the rule of `unit`, which has run, cost; None for none or at another rate."""
    extra = extra_percent(read_json(unit.path(out))["prices"])
    return Unit(unit.task, "softmax", unit.times, extra) if extra and unit.times == 1 else None


def extra_percent(prices: list[float]) -> int:
    """Whole percent more steps that cost what a rule cost."""
    price = sum(prices) / len(prices)
    return max(1, round(100 * price)) if price > _LEAST_PRICE else 0


def _missing(unit: Unit, plan: Plan, out: Path) -> list[int]:
    path = unit.path(out)
    done = set(read_json(path)["seeds"]) if path.is_file() else set()
    return [seed for seed in plan.seeds_of(unit) if seed not in done]


def _do(unit: Unit, plan: Plan, out: Path, device: str, bar: tqdm, ends: float | None) -> bool:
    """Train the missing seeds of a unit and keep them; False if its time was over before."""
    missing, task = _missing(unit, plan, out), TASKS[unit.task]
    together = task.together if device == "cpu" else len(missing)
    while missing:
        if ends is not None and time.monotonic() > ends:
            return False
        seeds, missing = missing[:together], missing[together:]
        bar.set_postfix_str(f"{unit.task}, {unit.rule}")
        started = time.perf_counter()
        rates = [task.rate * unit.times] * len(seeds)
        result = train(task, RULES[unit.rule], seeds, rates, unit.steps, device, bar.update)
        _keep(unit, out, seeds, result.scores, result.prices, time.perf_counter() - started)
    return True


def _keep(unit: Unit, out: Path, seeds: list[int], scores: list[float], prices: list[float], seconds: float) -> None:
    path = unit.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = (
        read_json(path) if path.is_file() else {"seeds": [], "scores": [], "prices": [], "seconds": 0.0}
    )
    if unequal := [score for score in scores if score != score]:
        logger.warning("%s, %s: %d of %d runs ended in NaN", unit.task, unit.rule, len(unequal), len(scores))
    content = {
        **unit._asdict(),
        "steps": unit.steps,
        "learning_rate": TASKS[unit.task].rate * unit.times,
        "torch": torch.__version__,
        "seeds": before["seeds"] + seeds,
        "scores": before["scores"] + scores,
        "prices": before["prices"] + prices,
        "seconds": before["seconds"] + seconds,
    }
    write_json(path, content)


def device_of(name: str) -> str:
    """The device if there is one; `UserError` else."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found cuda, expected cpu, for torch finds no CUDA device")
    return name
