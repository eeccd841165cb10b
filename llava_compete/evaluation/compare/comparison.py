"""Joins the per-sample results of several evaluations and says which differences are more than luck.

All runs must have answered the same questions with the same prompts and scoring. The first method is the baseline.
Units that share a group (questions about one image) are resampled together. Caller: `llava-compete compare`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_compete.errors import UserError
from llava_compete.evaluation.compare.evaluation_dirs import Method, Run
from llava_compete.evaluation.compare.statistics import Array, Benchmark, Difference, compare, holm
from llava_compete.evaluation.unit_scores import Unit

MEAN = "mean"
LEVEL = 0.05
# What a task's entry in summary.json must have in common for its scores to be comparable.
_SAME = ("generation", "task_version", "data")
# What may differ on purpose, and is then said in the report.
_SETTINGS = ("dtype", "adapter", "competition_at_inference")
_PACKAGES = ("lmms-eval", "torch", "transformers")


class Row(NamedTuple):
    """One benchmark (or the mean): scores in percent by method, their standard deviation over seeds, differences."""

    scores: dict[str, float]
    deviations: dict[str, float | None]
    differences: dict[str, Difference]
    num_units: int


@dataclass(frozen=True)
class Comparison:
    """Rows by benchmark, the mean last where there are several.

    Attributes:
        holm_questions, holm_seeds: `p_questions` and `p_seeds` by (benchmark, method), each corrected by Holm's method
            over all differences of the table; the latter is empty with one seed.
        notes: tasks that were left out, and settings in which the runs differ.
        published: published scores in percent by column name and task; another model, one run each.
    """

    baseline: str
    methods: list[str]
    num_seeds: int
    rows: dict[str, Row]
    holm_questions: dict[tuple[str, str], float]
    holm_seeds: dict[tuple[str, str], float]
    notes: list[str]
    published: dict[str, dict[str, float]]

    def is_apart(self, label: str, method: str) -> bool:
        """Whether the corrected p-value (over seeds too, where there are several) is below `LEVEL`."""
        return (self.holm_seeds or self.holm_questions)[label, method] < LEVEL

    def to_json(self) -> dict[str, Any]:
        rows = {}
        for task, row in self.rows.items():
            differences = {
                name: {
                    **asdict(difference),
                    "p_questions_holm": self.holm_questions[task, name],
                    "p_seeds_holm": self.holm_seeds.get((task, name)),
                }
                for name, difference in row.differences.items()
            }
            rows[task] = {
                "n": row.num_units,
                "scores": row.scores,
                "standard_deviation_over_seeds": row.deviations,
                "differences": differences,
            }
        return {
            "baseline": self.baseline,
            "methods": self.methods,
            "seeds": self.num_seeds,
            "unit": "percent",
            "notes": self.notes,
            "benchmarks": rows,
            "published": self.published,
        }


def compare_methods(
    methods: Sequence[Method], published: dict[str, dict[str, float]], resamples: int = 10_000
) -> Comparison:
    """Compare every method with the first; results that cannot be joined are a `UserError`."""
    if len(methods) < 2:
        raise UserError("expected at least two runs to compare")
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise UserError(f"two methods have the same name among {', '.join(names)}; give names as NAME=DIR")
    counts = {method.name: len(method.runs) for method in methods}
    if len(set(counts.values())) > 1:
        raise UserError(f"methods differ in their number of training seeds: {counts}")
    runs = [run for method in methods for run in method.runs]
    tasks = [task for task in runs[0].units if all(run.units.get(task) for run in runs)]
    if not tasks:
        raise UserError(f"no task with per-sample scores that all of {', '.join(names)} have")
    joined = {task: _join(task, methods) for task in tasks}
    groups = {task: [task] for task in tasks} | ({MEAN: tasks} if len(tasks) > 1 else {})
    keys = [(label, name) for label in groups for name in names[1:]]
    if 2 * len(keys) / (resamples + 1) >= LEVEL:  # the smallest p-value that so many draws can give, corrected
        raise UserError(f"resamples: found {resamples}, too few for {len(keys)} differences to be told from chance")
    rows = {label: _row(names, [joined[task] for task in members], resamples) for label, members in groups.items()}
    differences = [rows[label].differences[name] for label, name in keys]
    over_seeds = [difference.p_seeds for difference in differences if difference.p_seeds is not None]
    questions = holm([difference.p_questions for difference in differences])
    columns = {name: {task: scores[task] for task in tasks if task in scores} for name, scores in published.items()}
    return Comparison(
        baseline=names[0],
        methods=names,
        num_seeds=len(methods[0].runs),
        rows=rows,
        holm_questions=dict(zip(keys, questions, strict=True)),
        holm_seeds=dict(zip(keys, holm(over_seeds), strict=True)) if over_seeds else {},
        notes=list(_notes(runs, tasks)),
        published={name: scores for name, scores in columns.items() if scores},
    )


def _join(task: str, methods: Sequence[Method]) -> Benchmark:
    """Scores in percent of all runs on one benchmark, unit by unit, groups of units put together."""
    reference = _by_id(task, methods[0].runs[0])
    scores = []
    for method in methods:
        for run in method.runs:
            units = _by_id(task, run)
            _check_same(task, methods[0].runs[0], run)
            if units.keys() != reference.keys():
                raise UserError(
                    f"task {task!r}: {method.name!r} answered {len(units)} questions and {methods[0].name!r} "
                    f"{len(reference)}, {len(units.keys() & reference.keys())} of them the same; evaluate both alike"
                )
            wrong = next((name for name in reference if units[name].target != reference[name].target), None)
            if wrong is not None:
                raise UserError(
                    f"task {task!r}, question {wrong}: target {units[wrong].target!r} in {method.name!r} but "
                    f"{reference[wrong].target!r} in {methods[0].name!r}; the data differ"
                )
            scores.append([100 * units[name].score for name in reference])
    scores_MSU = np.array(scores).reshape(len(methods), len(methods[0].runs), len(reference))
    weights_U = np.array([unit.weight for unit in reference.values()])
    groups = [unit.id if unit.group is None else f"group {unit.group}" for unit in reference.values()]
    return _grouped(scores_MSU, weights_U, groups)


def _grouped(scores_MSU: Array, weights_U: Array, groups: Sequence[str]) -> Benchmark:
    """Units of one group become one, with their weighted mean as its score and the sum of their weights."""
    _, group_U = np.unique(groups, return_inverse=True)
    weights_G: Array = np.bincount(group_U, weights=weights_U).astype(np.float64)
    methods, seeds, units = scores_MSU.shape
    sums = [np.bincount(group_U, weights=scores_U * weights_U) for scores_U in scores_MSU.reshape(-1, units)]
    return Benchmark((np.array(sums) / weights_G).reshape(methods, seeds, -1), weights_G)


def _row(names: Sequence[str], joined: Sequence[Benchmark], resamples: int) -> Row:
    mean_MS = np.mean([benchmark.by_run_MS() for benchmark in joined], axis=0)
    several = mean_MS.shape[1] > 1
    return Row(
        scores=dict(zip(names, mean_MS.mean(axis=1).tolist(), strict=True)),
        deviations={
            name: float(scores_S.std(ddof=1)) if several else None
            for name, scores_S in zip(names, mean_MS, strict=True)
        },
        differences=dict(zip(names[1:], compare(joined, resamples), strict=True)),
        num_units=sum(len(benchmark.weights_U) for benchmark in joined),
    )


def _notes(runs: Sequence[Run], tasks: Sequence[str]) -> Iterator[str]:
    """What a reader of the table must know about the runs."""
    found = list(dict.fromkeys(task for run in runs for task in run.units))
    missing = [task for task in found if task not in tasks]
    if missing:
        yield f"Left out, since not all runs have per-sample scores of them: {', '.join(missing)}."
    for section, keys in (("settings", _SETTINGS), ("versions", _PACKAGES)):
        for key in keys:
            values = sorted({str(run.summary[section].get(key)) for run in runs if section in run.summary})
            if len(values) > 1:
                yield f"The runs differ in {key}: {', '.join(values)}."


def _check_same(task: str, first: Run, second: Run) -> None:
    """Runs whose task had other generation settings, scoring or data cannot be compared."""
    one, other = first.summary["tasks"][task], second.summary["tasks"][task]
    for key in _SAME:
        if key in one and key in other and one[key] != other[key]:
            raise UserError(
                f"task {task!r}: {key} is {other[key]!r} in {second.directory} and {one[key]!r} in {first.directory}; "
                "evaluate both alike"
            )


def _by_id(task: str, run: Run) -> dict[str, Unit]:
    units = {unit.id: unit for unit in run.units[task]}
    if len(units) < len(run.units[task]):
        raise UserError(f"{run.directory}: task {task!r}: ids of its samples are not unique")
    return units
