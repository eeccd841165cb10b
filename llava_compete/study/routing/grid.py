"""The runs of a study, several at once on a CPU, and the files that keep them: one a rule, task, rate and steps.

What is there is not trained again, so a study that was stopped goes on, and one with more seeds adds them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from llava_compete.errors import UserError
from llava_compete.files import read_json, write_json
from llava_compete.moe.allocator import keep_freed_memory
from llava_compete.processes import end_with_parent
from llava_compete.study.routing.plans import Plan, Unit
from llava_compete.study.routing.rules import RULES, Rule
from llava_compete.study.routing.tasks import TASKS, Task
from llava_compete.study.routing.training import Result, train

logger = logging.getLogger(__name__)
# A price is met by so many more steps, to a whole percent; below this it is none.
_LEAST_PRICE = 0.005
# What softmax of as many more steps as the rules cost adds to the rules' own time, roughly.
_EQUAL_ARITHMETIC = 0.5
_TIMED_STEPS = 8


class _Chunk(NamedTuple):
    """Runs of a unit that train together in one program."""

    unit: Unit
    seeds: list[int]

    @property
    def steps(self) -> int:
        return len(self.seeds) * self.unit.steps


def estimated_hours(plan: Plan, out: Path, device: str, workers: int = 1) -> float:
    """Of what is missing, from a few steps of each task on this machine, with `workers` of its cores."""
    seconds = 0.0
    pace: dict[str, float] = {}
    for unit in plan.units():
        missing = _missing(unit, plan, out)
        if not missing:
            continue
        if unit.task not in pace:
            pace[unit.task] = _seconds_a_run(TASKS[unit.task], device, workers)
        more = _EQUAL_ARITHMETIC if plan.equal_arithmetic and unit.times == 1 else 0.0
        seconds += (1 + more) * len(missing) * pace[unit.task]
    return seconds / workers / 3600


def _seconds_a_run(task: Task, device: str, workers: int) -> float:
    """Steps beside what a run has once: its data, and its score at the end."""
    runs = task.together if device == "cpu" else 30
    threads = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    spent = []
    for steps in (1, 1, 1 + _TIMED_STEPS):  # the first warms up
        started = time.perf_counter()
        train(task, RULES["judge_c80"], range(runs), [task.rate] * runs, steps, device)
        spent.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return (spent[1] + max(0.0, spent[2] - spent[1]) / _TIMED_STEPS * (task.steps - 1)) / runs


def run(plan: Plan, out: Path, device: str, minutes: float | None = None, workers: int = 1) -> bool:
    """Train what is missing, `workers` chunks of runs at a time; False where the `minutes` ended before the plan.

    `UserError` where a process of a worker dies; what was finished is kept.
    """
    ends = time.monotonic() + 60 * minutes if minutes is not None else None
    todo = _ToDo(plan, out, device)
    with tqdm(total=todo.steps, unit="step", unit_scale=True, desc="routing") as bar, _executor(workers) as pool:
        under_way: dict[Future[tuple[Result, float]], _Chunk] = {}
        while True:
            in_time = ends is None or time.monotonic() <= ends
            while in_time and len(under_way) < workers and todo.chunks:
                chunk = todo.chunks.popleft()
                bar.set_postfix_str(f"{chunk.unit.task}, {chunk.unit.rule}")
                task = TASKS[chunk.unit.task]
                work = (task, RULES[chunk.unit.rule], chunk.seeds, task.rate * chunk.unit.times, chunk.unit.steps)
                under_way[pool.submit(_timed, *work, device)] = chunk
            if not under_way:
                return not todo.chunks
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                chunk = under_way.pop(future)
                try:
                    _keep(chunk, out, *future.result())
                except BrokenProcessPool as error:
                    raise UserError(
                        f"{out}: a process that trained {chunk.unit.rule} on {chunk.unit.task} died (out of memory?); "
                        "the same command goes on, with fewer --workers if it was memory"
                    ) from error
                todo.finished(chunk)
                bar.total = todo.steps
                bar.update(chunk.steps)


class _ToDo:
    """Chunks that wait, most wanted first, and how many steps there are in all."""

    def __init__(self, plan: Plan, out: Path, device: str) -> None:
        self.chunks: deque[_Chunk] = deque()
        self.steps = 0
        self._plan, self._out, self._device = plan, out, device
        self._left: dict[Unit, int] = {}
        for unit in plan.units():
            self._add(unit)

    def finished(self, chunk: _Chunk) -> None:
        """The files of the chunk are written; with the last of a rule, softmax of equal arithmetic comes next."""
        self._left[chunk.unit] -= 1
        if self._left[chunk.unit] == 0:
            self._add_equal_arithmetic(chunk.unit)

    def _add(self, unit: Unit, first: bool = False) -> None:
        if unit in self._left:  # two rules of one price
            return
        missing, together = _missing(unit, self._plan, self._out), TASKS[unit.task].together
        if self._device != "cpu":
            together = max(1, len(missing))
        chunks = [_Chunk(unit, missing[start : start + together]) for start in range(0, len(missing), together)]
        self._left[unit] = len(chunks)
        self.steps += sum(chunk.steps for chunk in chunks)
        if first:
            self.chunks.extendleft(reversed(chunks))
        else:
            self.chunks.extend(chunks)
        if not chunks:
            self._add_equal_arithmetic(unit)

    def _add_equal_arithmetic(self, unit: Unit) -> None:
        more = equal_arithmetic(unit, self._out) if self._plan.equal_arithmetic and not unit.extra else None
        if more is not None:
            self._add(more, first=True)


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


def _timed(task: Task, rule: Rule, seeds: list[int], rate: float, steps: int, device: str) -> tuple[Result, float]:
    """The result and the seconds that it took."""
    started = time.perf_counter()
    result = train(task, rule, seeds, [rate] * len(seeds), steps, device)
    return result, time.perf_counter() - started


class _InThisProcess(Executor):
    """One piece of work at a time, done when it is submitted: in a thread Ctrl-C would not end it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _executor(workers: int) -> Executor:
    """Workers of one thread each: runs are small, and cores that share one wait for each other."""
    # A forked process could not use torch's threads, nor a GPU.
    return ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) if workers > 1 else _InThisProcess()


def _start_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    keep_freed_memory()


def _keep(chunk: _Chunk, out: Path, result: Result, seconds: float) -> None:
    unit, path = chunk.unit, chunk.unit.path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = (
        read_json(path) if path.is_file() else {"seeds": [], "scores": [], "prices": [], "seconds": 0.0}
    )
    if unequal := [score for score in result.scores if score != score]:
        logger.warning("%s, %s: %d of %d runs ended in NaN", unit.task, unit.rule, len(unequal), len(result.scores))
    content = {
        **unit._asdict(),
        "steps": unit.steps,
        "learning_rate": TASKS[unit.task].rate * unit.times,
        "torch": torch.__version__,
        "seeds": before["seeds"] + chunk.seeds,
        "scores": before["scores"] + result.scores,
        "prices": before["prices"] + result.prices,
        "seconds": before["seconds"] + seconds,
    }
    write_json(path, content)
