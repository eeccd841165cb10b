"""What the runs of the study say: each rule against softmax, paired by seed, at equal samples and equal arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_compete.evaluation.compare.statistics import PairedT, paired_t
from llava_compete.files import read_json
from llava_compete.study.routing.grid import extra_percent
from llava_compete.study.routing.rules import RULES
from llava_compete.study.routing.tasks import TASKS

Scores = dict[int, float]


class Row(NamedTuple):
    """One rule on one task at one learning rate, or None where nothing was run.

    Attributes:
        score: mean over its seeds.
        price: experts' arithmetic beyond softmax's, as a share.
        samples: minus softmax with as many steps.
        arithmetic: minus softmax with as many more steps as the price; that of `samples` where it is none.
        best_rate, best: the learning rate (times the task's) with the best mean, and there minus softmax at its best.
    """

    task: str
    rule: str
    times: float
    seeds: int
    score: float
    price: float
    samples: PairedT | None
    arithmetic: PairedT | None
    best_rate: float | None
    best: PairedT | None


class Runs:
    """All files of a folder."""

    def __init__(self, out: Path) -> None:
        self.files: list[dict[str, Any]] = [read_json(path) for path in sorted((out / "runs").rglob("*.json"))]
        self._by_key = {(f["task"], f["rule"], f["times"], f["extra"]): f for f in self.files}

    def scores(self, task: str, rule: str, times: float = 1.0, extra: int = 0) -> Scores:
        """By seed; empty where nothing was run."""
        file = self._by_key.get((task, rule, times, extra))
        return dict(zip(file["seeds"], file["scores"], strict=True)) if file else {}

    def prices(self, task: str, rule: str, times: float = 1.0) -> list[float]:
        return self._by_key[task, rule, times, 0]["prices"]

    def tasks(self) -> list[str]:
        return [name for name in TASKS if any(file["task"] == name for file in self.files)]

    def rates(self, task: str) -> list[float]:
        return sorted({file["times"] for file in self.files if file["task"] == task})

    def rows(self, task: str, times: float = 1.0) -> list[Row]:
        """The rules that ran on a task at a rate, in their order."""
        return [self._row(task, rule, times) for rule in RULES if self.scores(task, rule, times)]

    def _row(self, task: str, rule: str, times: float) -> Row:
        own, prices = self.scores(task, rule, times), self.prices(task, rule, times)
        extra = extra_percent(prices)
        at_cost = self.scores(task, "softmax", times, extra) if extra else self.scores(task, "softmax", times)
        rate, best = self._best(task, rule)
        base_rate, base = self._best(task, "softmax")
        several = len(self.rates(task)) > 1 and rate is not None and base_rate is not None
        return Row(
            task,
            rule,
            times,
            len(own),
            float(np.mean(list(own.values()))),
            float(np.mean(prices)),
            difference(own, self.scores(task, "softmax", times)) if rule != "softmax" else None,
            difference(own, at_cost) if rule != "softmax" else None,
            rate if several else None,
            difference(best, base) if several and rule != "softmax" else None,
        )

    def _best(self, task: str, rule: str) -> tuple[float | None, Scores]:
        """The rate with the best mean; chosen on the runs that are reported, for every rule alike."""
        found = {times: scores for times in self.rates(task) if (scores := self.scores(task, rule, times))}
        if not found:
            return None, {}
        sign = 1 if TASKS[task].higher_is_better else -1
        rate = max(found, key=lambda times: sign * float(np.mean(list(found[times].values()))))
        return rate, found[rate]


def difference(own: Scores, base: Scores) -> PairedT | None:
    """Paired by the seeds that both have; None with fewer than two."""
    common = sorted(own.keys() & base.keys())
    return paired_t([own[seed] - base[seed] for seed in common]) if len(common) > 1 else None


def half_width(test: PairedT) -> float | None:
    """Half of the 95% interval."""
    return None if test.interval is None else (test.interval.high - test.interval.low) / 2
