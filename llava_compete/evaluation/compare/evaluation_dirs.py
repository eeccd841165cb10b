"""Evaluation directories as `llava-compete compare` is given them: runs, and methods of one run a training seed.

Whatever is missing, unfinished, cut off or counted twice is a `UserError` here, before anything is computed.
Caller: `evaluation.compare`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit


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


def read_published(path: Path) -> dict[str, dict[str, float]]:
    """Published scores: a JSON file with `routers: {name: {task: percent}}`."""
    try:
        routers = json.loads(path.read_text(encoding="utf-8"))["routers"]
        return {name: {task: float(score) for task, score in scores.items()} for name, scores in routers.items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: expected a JSON file with 'routers': {{name: {{task: percent}}}} ({error})"
        ) from error


def _read_run(directory: Path) -> Run:
    """Read an evaluation directory; one that is missing, unfinished or cut off is a `UserError`."""
    summary_file = directory / "summary.json"
    if not summary_file.is_file():
        raise UserError(f"{directory}: no finished evaluation here (no summary.json)")
    try:
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        entries = dict(summary["tasks"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{summary_file}: not the summary of an evaluation ({error})") from error
    units = {}
    for task, entry in entries.items():
        file = directory / "samples" / f"{task}.jsonl"
        if not file.is_file():
            raise UserError(f"{file}: missing, although summary.json names the task; evaluate again")
        try:
            units[task] = [Unit(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: not per-sample scores ({error}); evaluate again") from error
        if units[task] and entry.get("n", len(units[task])) != len(units[task]):
            raise UserError(f"{file}: {len(units[task])} samples, but summary.json says {entry['n']}; evaluate again")
    return Run(directory, summary, units)


def _default_name(directory: Path) -> str:
    """The run's directory, not the `eval` folder inside it."""
    path = directory.resolve()
    return path.parent.name if path.name == "eval" else path.name
