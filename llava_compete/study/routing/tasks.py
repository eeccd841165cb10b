"""The tasks by name: sizes, steps and learning rates of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from llava_compete.study.routing.byte_text import ByteText
from llava_compete.study.routing.facts import Facts
from llava_compete.study.routing.layer import MoeLayer
from llava_compete.study.routing.rules import Rule
from llava_compete.study.routing.teacher import Gate, TeacherStudent


class Network(Protocol):
    """One rule on a task in R runs at once; `warmup` and `floor` are shares of the learning rate's schedule."""

    warmup: float
    floor: float
    layers: list[MoeLayer]

    @property
    def parameters(self) -> list[Tensor]: ...

    def loss_R(self, step: int, competing_LR: list[Tensor | None]) -> Tensor: ...

    def score_R(self) -> Tensor: ...


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        build: network of (rule, seeds, steps, device).
        steps: of a run at equal samples.
        rate: the learning rate that is called x1.
        higher_is_better: accuracy, or else an error.
        layers: sparse layers.
        together: runs that train at once on a CPU, whose caches hold so many.
    """

    name: str
    title: str
    unit: str
    build: Callable[[Rule, Sequence[int], int, str], Network]
    steps: int
    rate: float
    higher_is_better: bool
    layers: int
    together: int


def _facts(tasks: int, steps: int) -> Task:
    build = functools.partial(Facts, num_tasks=tasks)
    return Task(f"facts_{tasks}", f"facts, {tasks} tasks", "% right", build, steps, 6e-3, True, 2, 10)


def _teacher(gate: Gate, samples: int) -> Task:
    build = functools.partial(TeacherStudent, gate=gate, samples=samples)
    name, title = f"teacher_{gate}_{samples}", f"teacher gated by {gate}, n {samples:,}"
    return Task(name, title, "error / variance", build, 500, 1e-2, False, 1, 30)


def _wide(task: Task) -> Task:
    """The same, routers started at the standard deviation sqrt(0.02): N(0, 0.02) where 0.02 is the variance."""
    build = functools.partial(_build_wide, task.build)
    return replace(task, name=f"wide_{task.name}", title=f"{task.title}, routers started wide", build=build)


def _build_wide(build: Callable[..., Network], rule: Rule, seeds: Sequence[int], steps: int, device: str) -> Network:
    return build(replace(rule, router_std=0.02**0.5), seeds, steps, device)


_ALL = (
    _facts(8, 400),
    _facts(24, 1200),
    _facts(64, 2400),  # 65 kbit of facts for 24 thousand weights: more steps hardly help
    *(_teacher(gate, samples) for gate in ("competition", "softmax", "clusters") for samples in (1000, 8000)),
    Task("bytes", "bytes of six sources", "bits a byte", ByteText, 1600, 4e-3, False, 2, 4),
)
WIDE = tuple(_wide(task) for task in _ALL if task.name in ("facts_8", "facts_24", "teacher_competition_1000"))
TASKS = {task.name: task for task in (*_ALL, *WIDE)}
