"""Which differences between the scores of several methods are more than luck. The first method is the baseline.

With several training seeds a method is judged over them; with one, only these very models can be, over questions. The
verdict is of one named row (`primary`), corrected over its methods by Holm's method; the other rows are there to look
at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_compete.errors import UserError
from llava_compete.evaluation.compare.evaluation_dirs import SETTINGS, Method, Run, check_distinct, pair_by_seed
from llava_compete.evaluation.compare.joining import join
from llava_compete.evaluation.compare.questions import Benchmark, permutation_p, question_intervals
from llava_compete.evaluation.compare.statistics import (
    LEVEL,
    Interval,
    detectable_effect,
    equivalence,
    holm,
    paired_t,
)

MEAN = "mean"
_PACKAGES = ("llava_compete", "lmms-eval", "lm-eval", "torch", "transformers")
# Numbers of seeds that the power table asks about.
_SEEDS = (3, 5, 10, 20, 30)


class Difference(NamedTuple):
    """One method minus the baseline, in points.

    Attributes:
        mean: over seeds and units.
        over_seeds: 95% interval if both trainings were repeated, these questions asked (paired t by seed); None with
            one seed, and where all seeds have the same difference.
        p: two-sided: of that t, or with one seed of a permutation over questions, for these trained models only.
        deviation: standard deviation of the differences over seeds.
        p_equivalent: of two one-sided tests against the margin; None without a margin or with one seed.
        over_questions: 95% interval if these very models met other questions of the same kind.
    """

    mean: float
    over_seeds: Interval | None
    p: float | None
    deviation: float | None
    p_equivalent: float | None
    over_questions: Interval


class Row(NamedTuple):
    """One benchmark (or the mean): scores in percent of each run by method, differences by method."""

    runs: dict[str, list[float]]
    differences: dict[str, Difference]
    num_units: int

    def score(self, method: str) -> float:
        return float(np.mean(self.runs[method]))

    def deviation(self, method: str) -> float | None:
        """Standard deviation over seeds."""
        return float(np.std(self.runs[method], ddof=1)) if len(self.runs[method]) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Rows by benchmark, the mean last where there are several.

    Attributes:
        primary: the row that is judged.
        margin: points within which methods count as equal, if the user named some.
        holm: p of the primary row by method, corrected over the methods; without those that have none.
        holm_equivalent: the same of `p_equivalent`.
        notes: how runs were paired, tasks that were left out, and settings in which the runs differ.
        published: published scores in percent by column name and task; another model, one run each.
    """

    baseline: str
    methods: list[str]
    num_seeds: int
    rows: dict[str, Row]
    primary: str
    margin: float | None
    holm: dict[str, float]
    holm_equivalent: dict[str, float]
    notes: list[str]
    published: dict[str, dict[str, float]]

    def is_apart(self, method: str) -> bool:
        """Whether the corrected p of the primary row is below `LEVEL`."""
        return self.holm.get(method, 1.0) < LEVEL

    def is_equivalent(self, method: str) -> bool:
        """Whether the method is shown to lie within the margin on the primary row."""
        return self.holm_equivalent.get(method, 1.0) < LEVEL

    def detectable(self) -> dict[str, dict[int, float]]:
        """By method, the true difference found with a power of 80% on the primary row with so many seeds.

        At Holm's strictest step, as if the other methods' p were larger. Empty with one seed.
        """
        level = LEVEL / len(self.methods[1:])
        return {
            name: {
                seeds: detectable_effect(difference.deviation, seeds, level)
                for seeds in sorted({self.num_seeds, *_SEEDS})
            }
            for name, difference in self.rows[self.primary].differences.items()
            if difference.deviation is not None
        }

    def to_json(self) -> dict[str, Any]:
        rows = {
            task: {
                "n": row.num_units,
                "scores": {name: row.score(name) for name in self.methods},
                "scores_by_run": row.runs,
                "standard_deviation_over_seeds": {name: row.deviation(name) for name in self.methods},
                "differences": {name: difference._asdict() for name, difference in row.differences.items()},
            }
            for task, row in self.rows.items()
        }
        return {
            "baseline": self.baseline,
            "methods": self.methods,
            "seeds": self.num_seeds,
            "unit": "percent",
            "primary": self.primary,
            "p_holm": self.holm,
            "margin": self.margin,
            "p_equivalent_holm": self.holm_equivalent,
            "detectable_difference_by_seeds": self.detectable(),
            "notes": self.notes,
            "benchmarks": rows,
            "published": self.published,
        }


def compare_methods(
    methods: Sequence[Method],
    published: dict[str, dict[str, float]],
    *,
    primary: str | None = None,
    margin: float | None = None,
    resamples: int = 10_000,
) -> Comparison:
    """Compare every method with the first; results that cannot be joined are a `UserError`.

    Args:
        published: see `Comparison`.
        primary: the row to judge; default the mean, or the only benchmark.
        margin: points within which a difference does not matter.
        resamples: draws over questions.
    """
    names = [method.name for method in methods]
    _check_methods(methods)
    methods, paired = pair_by_seed(methods)
    num_seeds = len(methods[0].runs)
    runs = [run for method in methods for run in method.runs]
    tasks = [task for task in runs[0].units if all(run.units.get(task) for run in runs)]
    if not tasks:
        raise UserError(f"no task with per-sample scores that all of {', '.join(names)} have")
    members = {task: [task] for task in tasks} | ({MEAN: tasks} if len(tasks) > 1 else {})
    primary = primary or list(members)[-1]
    if primary not in members:
        raise UserError(f"primary: found {primary!r}, expected one of {', '.join(members)}")
    if margin is not None and (margin <= 0 or num_seeds < 2):
        raise UserError(f"margin: found {margin} with {num_seeds} seed(s), expected above 0 and at least 2 seeds")
    if num_seeds == 1 and 2 * (len(names) - 1) / (resamples + 1) >= LEVEL:  # the smallest corrected p of so many draws
        raise UserError(
            f"resamples: found {resamples}, too few for {len(names) - 1} differences to be told from chance"
        )
    joined = {task: join(task, methods) for task in tasks}
    rows = {label: _row(names, [joined[task] for task in parts], margin, resamples) for label, parts in members.items()}
    judged = rows[primary].differences
    columns = {name: {task: scores[task] for task in tasks if task in scores} for name, scores in published.items()}
    return Comparison(
        baseline=names[0],
        methods=names,
        num_seeds=num_seeds,
        rows=rows,
        primary=primary,
        margin=margin,
        holm=_corrected({name: difference.p for name, difference in judged.items()}),
        holm_equivalent=_corrected({name: difference.p_equivalent for name, difference in judged.items()}),
        notes=[*([paired] if num_seeds > 1 else []), *_notes(runs, tasks)],
        published={name: scores for name, scores in columns.items() if scores},
    )


def _check_methods(methods: Sequence[Method]) -> None:
    names = [method.name for method in methods]
    if len(methods) < 2:
        raise UserError("expected at least two runs to compare")
    if len(set(names)) < len(names):
        raise UserError(f"two methods have the same name among {', '.join(names)}; give names as NAME=DIR")
    counts = {method.name: len(method.runs) for method in methods}
    if len(set(counts.values())) > 1:
        raise UserError(f"methods differ in their number of training seeds: {counts}")
    check_distinct(methods)


def _corrected(p_values: dict[str, float | None]) -> dict[str, float]:
    found = {name: p for name, p in p_values.items() if p is not None}
    return dict(zip(found, holm(list(found.values())), strict=True))


def _row(names: Sequence[str], joined: Sequence[Benchmark], margin: float | None, resamples: int) -> Row:
    by_run_MS = np.mean([benchmark.by_run_MS() for benchmark in joined], axis=0)
    differences_MS = by_run_MS[1:] - by_run_MS[:1]
    questions = question_intervals(joined, resamples)
    several = by_run_MS.shape[1] > 1
    permuted = [None] * len(questions) if several else permutation_p(joined, resamples)
    differences = {}
    for name, values_S, interval, p in zip(names[1:], differences_MS, questions, permuted, strict=True):
        if several:
            found = paired_t(values_S)
            equal = None if margin is None else equivalence(values_S, margin)
            differences[name] = Difference(found.mean, found.interval, found.p, found.deviation, equal, interval)
        else:
            differences[name] = Difference(float(values_S[0]), None, p, None, None, interval)
    return Row(
        runs=dict(zip(names, by_run_MS.tolist(), strict=True)),
        differences=differences,
        num_units=sum(len(benchmark.weights_U) for benchmark in joined),
    )


def _notes(runs: Sequence[Run], tasks: Sequence[str]) -> Iterator[str]:
    """What a reader of the table must know about the runs."""
    found = list(dict.fromkeys(task for run in runs for task in run.units))
    missing = [task for task in found if task not in tasks]
    if missing:
        yield f"Left out, since not all runs have per-sample scores of them: {', '.join(missing)}."
    seeds = {run.training_seed for run in runs}
    if len(runs) == len({run.training_seed for run in runs}) and None not in seeds:
        yield f"The runs differ in training seed: {', '.join(map(str, sorted(seeds)))}."  # type: ignore[type-var]
    for section, keys in (("settings", SETTINGS), ("versions", _PACKAGES)):
        for key in keys:
            values = sorted({str(run.summary[section].get(key)) for run in runs if section in run.summary})
            if len(values) > 1:
                yield f"The runs differ in {key}: {', '.join(values)}."
