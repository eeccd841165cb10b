"""Joins the per-sample results of several evaluations, unit by unit.

All runs must have answered the same questions with the same prompts and scoring; anything else is a `UserError`. Units
that share a group (questions about one image) become one: they are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_compete.errors import UserError
from llava_compete.evaluation.compare.evaluation_dirs import Method, Run
from llava_compete.evaluation.compare.questions import Benchmark
from llava_compete.evaluation.compare.statistics import Array
from llava_compete.evaluation.unit_scores import Unit

# What a task's entry in summary.json must have in common for its scores to be comparable.
_SAME = ("generation", "task_version", "metric", "data")


def join(task: str, methods: Sequence[Method]) -> Benchmark:
    """Scores in percent of all runs on one benchmark, unit by unit, groups of units put together."""
    first = methods[0].runs[0]
    reference = _by_id(task, first)
    scores = []
    for method in methods:
        for run in method.runs:
            units = _by_id(task, run)
            _check_same(task, _SAME, first, run)
            if units.keys() != reference.keys():
                raise UserError(
                    f"task {task!r}: {method.name!r} answered {len(units)} questions and {methods[0].name!r} "
                    f"{len(reference)}, {len(units.keys() & reference.keys())} of them the same; evaluate both alike"
                )
            for key in ("target", "weight"):
                wrong = next((n for n in reference if getattr(units[n], key) != getattr(reference[n], key)), None)
                if wrong is not None:
                    raise UserError(
                        f"task {task!r}, question {wrong}: {key} {getattr(units[wrong], key)!r} in {method.name!r} but "
                        f"{getattr(reference[wrong], key)!r} in {methods[0].name!r}; the data differ"
                    )
            _check_same(task, ("asked",), first, run)
            scores.append([100 * units[name].score for name in reference])
    scores_MSU = np.array(scores).reshape(len(methods), len(methods[0].runs), len(reference))
    weights_U = np.array([unit.weight for unit in reference.values()])
    groups = [f"unit {unit.id}" if unit.group is None else f"group {unit.group}" for unit in reference.values()]
    return group_units(scores_MSU, weights_U, groups)


def group_units(scores_MSU: Array, weights_U: Array, groups: Sequence[str]) -> Benchmark:
    """Units of one group become one, with their weighted mean as its score and the sum of their weights."""
    _, group_U = np.unique(groups, return_inverse=True)
    weights_G: Array = np.bincount(group_U, weights=weights_U).astype(np.float64)
    methods, seeds, units = scores_MSU.shape
    sums = [np.bincount(group_U, weights=scores_U * weights_U) for scores_U in scores_MSU.reshape(-1, units)]
    return Benchmark((np.array(sums) / weights_G).reshape(methods, seeds, -1), weights_G)


def _check_same(task: str, keys: Sequence[str], first: Run, second: Run) -> None:
    """Runs whose task had other generation settings, scoring or data cannot be compared."""
    one, other = first.summary["tasks"][task], second.summary["tasks"][task]
    for key in keys:
        if one.get(key) != other.get(key):
            raise UserError(
                f"task {task!r}: {key} is {other.get(key)!r} in {second.directory} and {one.get(key)!r} in "
                f"{first.directory}; evaluate both alike"
            )


def _by_id(task: str, run: Run) -> dict[str, Unit]:
    units = {unit.id: unit for unit in run.units[task]}
    if len(units) < len(run.units[task]):
        raise UserError(f"{run.directory}: task {task!r}: ids of its samples are not unique")
    return units
