"""What lies on disk of a run: its checkpoint, its log, its parents and its evaluation. Nothing is computed here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_compete.config import read_yaml
from llava_compete.errors import UserError
from llava_compete.evaluation.checkpoint_facts import checkpoint_config
from llava_compete.evaluation.unit_scores import Unit, read_units, standard_error, weighted_mean
from llava_compete.files import read_json, read_json_lines

_MOST_STAGES = 16  # between a mixture and its dense parent


@dataclass
class RunFacts:
    """name: how the report calls it; checkpoint: None for a run without a finished model; steps: lines of metrics.jsonl
    with a loss; evaluation: "tasks" of its evaluations' summary.json; units: by task; dense_parent: of a mixture, the
    model that was upcycled, as far as the run's own record leads to it."""

    name: str
    path: Path
    checkpoint: Path | None
    stage: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    units: dict[str, list[Unit]] = field(default_factory=dict)
    dense_parent: RunFacts | None = None


def find_runs(paths: list[Path], evaluations: list[Path]) -> list[RunFacts]:
    """The runs that paths name: a checkpoint, a stage's directory, or one that holds stages (then the last of them).

    Args:
        evaluations: directories that `llava-compete eval` wrote, beside those that are found next to a checkpoint; each
            says itself which checkpoint it is of.
    """
    runs = [_run(path) for path in paths]
    _name_apart(runs)
    given = [run.path.resolve() for run in runs]
    for run in runs:
        parent = _dense_parent(run.path)
        if parent is not None and parent.resolve() not in given:
            run.dense_parent = _run(parent)
    known = [*runs, *(run.dense_parent for run in runs if run.dense_parent is not None)]
    seen: dict[tuple[int, str], Path] = {}
    for directory in evaluations:
        checkpoint = _summary(directory)["checkpoint"]["path"]
        of = [run for run in known if run.checkpoint is not None and _is_same(run.checkpoint, Path(checkpoint))]
        if not of:
            raise UserError(f"{directory}: evaluates {checkpoint}, which is none of the runs given or their parents")
        for run in of:
            for task in _add_evaluation(run, directory):
                before = seen.setdefault((id(run), task), directory)
                if before != directory:
                    raise UserError(f"{directory}: has task {task!r} of {run.name}, as {before} has; give one of them")
    return runs


def _run(path: Path) -> RunFacts:
    if not path.exists():
        raise UserError(f"{path}: no such directory")
    if (path / "stages").is_dir():
        path = _last_stage(path)
    has_model = (path / "config.json").is_file()
    log = path / "run" / "metrics.jsonl"
    if not has_model and not log.is_file():
        raise UserError(f"{path}: neither a checkpoint (config.json) nor a stage's directory (run/metrics.jsonl)")
    run = RunFacts(path.name, path, path if has_model else None)
    if has_model:
        run.stage = checkpoint_config(path).get("stage")
    if log.is_file():
        lines = read_json_lines(log, may_break_off=True)
        run.steps = [_with_nan(line) for line in lines if "loss" in line and "step" in line]
    for directory in (path / "eval", path.parent / "eval", path.parent / f"eval_{path.name}"):
        if (
            has_model
            and (directory / "summary.json").is_file()
            and _is_same(path, Path(_summary(directory)["checkpoint"]["path"]))
        ):
            _add_evaluation(run, directory)
            break
    return run


def _with_nan(line: dict[str, Any]) -> dict[str, Any]:
    """A log's line with its losses as numbers: of a step that was skipped they are null there."""
    return {key: math.nan if value is None and key.endswith("loss") else value for key, value in line.items()}


def with_checkpoints(path: Path) -> list[Path]:
    """The whole checkpoints that a stage has kept, oldest first, and its result."""
    numbered = [child for child in path.glob("checkpoint-*") if child.name.rpartition("-")[2].isdecimal()]
    kept = [child for child in numbered if (child / "config.json").is_file()]
    if not kept:
        raise UserError(f"{path}: no checkpoint-* with a whole model (a stage of adapters keeps only these)")
    return [*sorted(kept, key=lambda child: int(child.name.rpartition("-")[2])), path]


def _dense_parent(path: Path) -> Path | None:
    """The model that a mixture was upcycled from, by the records of the stages between; None where one is not there."""
    if not (path / "config.json").is_file() or checkpoint_config(path).get("moe") is None:
        return None
    for _ in range(_MOST_STAGES):
        record = path / "run" / "config.yaml"
        start = (read_yaml(record).get("model") or {}).get("checkpoint") if record.is_file() else None
        if start is None or not (Path(start) / "config.json").is_file():
            break
        path = Path(start)
        if checkpoint_config(path).get("moe") is None:
            return path
    return None


def _last_stage(path: Path) -> Path:
    """Of a pipeline's directory the stage whose model was written last."""
    models = [child for child in path.iterdir() if (child / "config.json").is_file() and (child / "run").is_dir()]
    if not models:
        raise UserError(f"{path}: none of its stages has written a model")
    return max(models, key=lambda child: (child / "config.json").stat().st_mtime)


def _name_apart(runs: list[RunFacts]) -> None:
    """Names by the last parts of the paths that differ."""
    for depth in range(1, 8):
        names = ["/".join(run.path.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            for run, name in zip(runs, names, strict=True):
                run.name = name
            return
    raise UserError(f"the same run twice: {', '.join(str(run.path) for run in runs)}")


def _summary(directory: Path) -> dict[str, Any]:
    file = directory / "summary.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; expected a directory that llava-compete eval wrote")
    summary = read_json(file)
    if not isinstance(summary, dict) or not {"checkpoint", "tasks"} <= summary.keys():
        raise UserError(f"{file}: not the summary of an evaluation; expected the keys checkpoint and tasks")
    return summary


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths mean one checkpoint; a run that was moved is known by its name."""
    return one.resolve() == other.resolve() or (not other.exists() and one.name == other.name)


def _add_evaluation(run: RunFacts, directory: Path) -> list[str]:
    """The tasks that it has; one that the run had from elsewhere gives way."""
    tasks = _summary(directory)["tasks"]
    units = {task: read_units(directory, task) for task in tasks}
    units = {task: found for task, found in units.items() if found}  # a perplexity has no scores of single samples
    run.evaluation = {"tasks": {**(run.evaluation or {"tasks": {}})["tasks"], **tasks}}
    run.units = {**run.units, **units}
    return list(units)


@dataclass(frozen=True)
class TypeScore:
    """Score of one question type in percent, with its standard error over independent units."""

    kind: str
    score: float
    error: float | None
    count: int


def scores_by_type(units: list[Unit]) -> list[TypeScore]:
    """All questions first, then each type; the error is over groups of units that share an image."""
    kinds: dict[str, list[Unit]] = {"all": units}
    for unit in units:
        kinds.setdefault(unit.type or "", []).append(unit)
    if set(kinds) == {"all", ""}:
        del kinds[""]
    return [
        TypeScore(kind or "(no type)", 100 * weighted_mean(found), _percent(standard_error(found)), len(found))
        for kind, found in kinds.items()
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
