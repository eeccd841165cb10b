"""Joins the per-sample results of several evaluations and says which differences are more than luck.

A method is one or more evaluation directories, one for each training seed; all must have answered the same questions
with the same settings. The first method is the baseline. Caller: `llava-compete compare`, scripts/compare_routers.sh.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_compete.errors import UserError
from llava_compete.evaluation.scores import Unit
from llava_compete.evaluation.statistics import Array, Benchmark, Difference, compare, holm

log = logging.getLogger(__name__)
MEAN = "mean"


@dataclass(frozen=True)
class Method:
    """Evaluations of one method; `runs` holds for each seed the units by task."""

    name: str
    runs: list[dict[str, list[Unit]]]


class Row(NamedTuple):
    """One benchmark (or the mean): scores in percent by method, their standard deviation over seeds, differences."""

    scores: dict[str, float]
    deviations: dict[str, float | None]
    differences: dict[str, Difference]
    num_units: int


@dataclass(frozen=True)
class Comparison:
    """Rows by benchmark, the mean last where there are several; Holm's correction covers all differences of the table.

    Attributes:
        holm_p: corrected `p_questions` by (benchmark, method).
        published: published scores in percent by column name and task; another model, one run each.
    """

    baseline: str
    methods: list[str]
    num_seeds: int
    rows: dict[str, Row]
    holm_p: dict[tuple[str, str], float]
    published: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        rows = {}
        for task, row in self.rows.items():
            differences = {
                name: {**asdict(difference), "p_holm": self.holm_p[task, name]}
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
            "benchmarks": rows,
            "published": self.published,
        }


def read_method(argument: str) -> Method:
    """Read `DIR`, `NAME=DIR` or `NAME=DIR,DIR,...` (one directory a training seed)."""
    name, separator, directories = argument.rpartition("=")
    paths = [Path(part) for part in directories.split(",") if part]
    if not paths:
        raise UserError(f"{argument!r}: expected DIR or NAME=DIR,DIR,...")
    return Method(name if separator else _default_name(paths[0]), [_read_run(path) for path in paths])


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
    tasks = [task for task in methods[0].runs[0] if all(task in run for method in methods for run in method.runs)]
    if not tasks:
        raise UserError(f"no task that all of {', '.join(names)} have")
    joined = {task: _join(task, methods) for task in tasks}
    groups = {task: [task] for task in tasks} | ({MEAN: tasks} if len(tasks) > 1 else {})
    rows = {label: _row(names, [joined[task] for task in members], resamples) for label, members in groups.items()}
    keys = [(label, name) for label, row in rows.items() for name in row.differences]
    corrected = holm([rows[label].differences[name].p_questions for label, name in keys])
    return Comparison(
        baseline=names[0],
        methods=names,
        num_seeds=len(methods[0].runs),
        rows=rows,
        holm_p=dict(zip(keys, corrected, strict=True)),
        published={
            column: {task: scores[task] for task in tasks if task in scores} for column, scores in published.items()
        },
    )


def read_published(path: Path) -> dict[str, dict[str, float]]:
    """Published scores: a JSON file with `routers: {name: {task: percent}}`."""
    try:
        routers = json.loads(path.read_text(encoding="utf-8"))["routers"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: expected a JSON file with 'routers': {{name: {{task: percent}}}} ({error})"
        ) from error
    return {name: dict(scores) for name, scores in routers.items()}


class _Joined(NamedTuple):
    """Scores in percent of all runs on one benchmark: methods, seeds, units; and the units' weights."""

    scores_MSU: Array
    weights_U: Array


def _join(task: str, methods: Sequence[Method]) -> _Joined:
    reference = {unit.id: unit for unit in methods[0].runs[0][task]}
    if len(reference) < len(methods[0].runs[0][task]):
        raise UserError(f"task {task!r}: ids of {methods[0].name!r} are not unique")
    scores = []
    for method in methods:
        for run in method.runs:
            units = {unit.id: unit for unit in run[task]}
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
    shape = (len(methods), len(methods[0].runs), len(reference))
    weights = np.array([unit.weight for unit in reference.values()])
    return _Joined(np.array(scores).reshape(shape), weights)


def _row(names: Sequence[str], joined: Sequence[_Joined], resamples: int) -> Row:
    run_scores = [item.scores_MSU @ item.weights_U / item.weights_U.sum() for item in joined]
    mean_MS = np.mean(run_scores, axis=0)
    benchmarks = [Benchmark(item.scores_MSU[1:] - item.scores_MSU[:1], item.weights_U) for item in joined]
    differences = compare(benchmarks, [(scores[0], scores[1:]) for scores in run_scores], resamples)
    several = mean_MS.shape[1] > 1
    return Row(
        scores=dict(zip(names, mean_MS.mean(axis=1).tolist(), strict=True)),
        deviations={
            name: float(scores_S.std(ddof=1)) if several else None
            for name, scores_S in zip(names, mean_MS, strict=True)
        },
        differences=dict(zip(names[1:], differences, strict=True)),
        num_units=sum(len(item.weights_U) for item in joined),
    )


def _read_run(directory: Path) -> dict[str, list[Unit]]:
    summary_file = directory / "summary.json"
    if not summary_file.is_file():
        raise UserError(f"{directory}: no finished evaluation here (no summary.json)")
    units = {}
    for task in json.loads(summary_file.read_text(encoding="utf-8"))["tasks"]:
        lines = (directory / "samples" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        units[task] = [Unit(**json.loads(line)) for line in lines]
    return units


def _default_name(directory: Path) -> str:
    """The run's directory, not the `eval` folder inside it."""
    path = directory.resolve()
    return path.parent.name if path.name == "eval" else path.name
