"""Evaluation directories as `llava-compete compare` is given them: runs, and methods of one run a training seed.

Whatever is missing, unfinished, cut off, damaged or counted twice is a `UserError` here, before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit, read_units, weighted_mean
from llava_compete.files import read_json

# Settings that may move a score of the same checkpoint and questions.
SETTINGS = ("dtype", "adapter", "competition_at_inference")


@dataclass(frozen=True)
class Run:
    """One evaluation directory: its summary.json, and its units by task."""

    directory: Path
    summary: dict[str, Any]
    units: dict[str, list[Unit]]

    @property
    def checkpoint(self) -> str | None:
        """SHA-256 of what was evaluated, adapter included, if the summary says so."""
        facts = self.summary.get("checkpoint") or {}
        return facts.get("sha256") and f"{facts['sha256']}{facts.get('adapter_sha256') or ''}"

    @property
    def training_seed(self) -> int | None:
        """The seed that the checkpoint was trained with, if its manifest was found when it was evaluated."""
        return (self.summary.get("checkpoint") or {}).get("training_seed")

    @property
    def identity(self) -> tuple[str, ...]:
        """Two runs that have this in common are one evaluation: the checkpoint, and all settings that move a score."""
        if self.checkpoint is None:
            return (str(self.directory.resolve()),)
        settings = self.summary.get("settings") or {}
        return (self.checkpoint, *(str(settings.get(key)) for key in SETTINGS))


@dataclass(frozen=True)
class Method:
    """Evaluations of one method, one for each training seed."""

    name: str
    runs: list[Run]


def read_method(argument: str) -> Method:
    """Read `DIR`, `NAME=DIR` or `NAME=DIR,DIR,...` (one directory a training seed)."""
    name, directories = "", argument
    if "=" in argument and not Path(argument).is_dir():
        name, _, directories = argument.partition("=")
    paths = [Path(part) for part in directories.split(",") if part]
    if not paths:
        raise UserError(f"{argument!r}: expected DIR or NAME=DIR,DIR,...")
    method = Method(name or _default_name(paths[0]), [_read_run(path) for path in paths])
    seen: dict[str, Path] = {}
    for run in method.runs:
        first = seen.setdefault(run.checkpoint or str(run.directory.resolve()), run.directory)
        if first is not run.directory:
            raise UserError(
                f"{method.name}: {run.directory} and {first} are evaluations of the same checkpoint; "
                "expected one directory for each training seed"
            )
    return method


def check_distinct(methods: Sequence[Method]) -> None:
    """One evaluation under two names would be compared with itself: a `UserError`."""
    seen: dict[tuple[str, ...], str] = {}
    for method in methods:
        for run in method.runs:
            where = f"{run.directory} ({method.name})"
            first = seen.setdefault(run.identity, where)
            if first is not where:
                raise UserError(f"{where} and {first} are the same evaluation: one checkpoint with the same settings")


def pair_by_seed(methods: Sequence[Method]) -> tuple[list[Method], str]:
    """Methods with their runs in the order of the recorded training seeds, and how runs were paired, in words.

    Where seeds are not recorded, or not told apart by them, the order on the command line pairs.
    """
    seeds = {method.name: [run.training_seed for run in method.runs] for method in methods}
    if any(None in found or len(set(found)) < len(found) for found in seeds.values()):
        unknown = [name for name, found in seeds.items() if None in found]
        why = f"{', '.join(unknown)} recorded no training seed" if unknown else "several runs of a method share a seed"
        return list(methods), f"Runs are paired by their order on the command line: {why}."
    first = methods[0].name
    for name, found in seeds.items():
        if set(found) != set(seeds[first]):
            raise UserError(
                f"training seeds are {_listed(found)} in {name!r} and {_listed(seeds[first])} in {first!r}; "
                "expected the same, since runs are paired by seed"
            )
    ordered = [replace(method, runs=sorted(method.runs, key=lambda run: run.training_seed or 0)) for method in methods]
    return ordered, f"Runs are paired by training seed: {_listed(seeds[first])}."


def read_published(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Published scores of JSON files with `routers: {name: {task: percent}}`; a name that an earlier file has gets its
    file's beside it."""
    published: dict[str, dict[str, float]] = {}
    for path in paths:
        try:
            for name, scores in read_json(path)["routers"].items():
                column = f"{name} ({path.stem})" if name in published else name
                published[column] = {task: float(score) for task, score in scores.items()}
        except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: expected a JSON file with 'routers': {{name: {{task: percent}}}} ({error})"
            ) from error
    return published


def _read_run(directory: Path) -> Run:
    """Read an evaluation directory; one that is missing, unfinished, cut off or altered is a `UserError`."""
    summary_file = directory / "summary.json"
    if not summary_file.is_file():
        raise UserError(f"{directory}: no finished evaluation here (no summary.json)")
    try:
        summary = read_json(summary_file)
        entries = {task: dict(entry) for task, entry in summary["tasks"].items()}
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{summary_file}: not the summary of an evaluation ({error})") from error
    units = {}
    for task, entry in entries.items():
        file = directory / "samples" / f"{task}.jsonl"
        if not file.is_file():
            raise UserError(f"{file}: missing, although summary.json names the task; evaluate again")
        units[task] = read_units(directory, task)
        if units[task]:
            _check_against_summary(file, units[task], entry)
    return Run(directory, summary, units)


def _check_against_summary(file: Path, units: list[Unit], entry: dict[str, Any]) -> None:
    if entry.get("n", len(units)) != len(units):
        raise UserError(f"{file}: {len(units)} samples, but summary.json says {entry['n']}; evaluate again")
    recomputed, stated = weighted_mean(units), entry.get("accuracy")
    if not isinstance(stated, int | float) or not math.isclose(recomputed, stated, abs_tol=1e-6):
        raise UserError(f"{file}: these samples score {recomputed:.6f}, but summary.json says {stated}; evaluate again")


def _listed(seeds: Sequence[int | None]) -> str:
    return ", ".join(map(str, sorted(seed for seed in seeds if seed is not None)))


def _default_name(directory: Path) -> str:
    """The run's directory, not the `eval` folder inside it."""
    path = directory.resolve()
    return path.parent.name if path.name == "eval" else path.name
