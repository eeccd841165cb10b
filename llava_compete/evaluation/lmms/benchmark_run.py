"""Runs lmms-eval's own command line on a checkpoint, task by task, and writes scores that say where they come from.

Layout of an evaluation directory:

    summary.json       {"tasks": {NAME: {"accuracy", "chance", "n", "by_type", ...}}, "failures", "checkpoint", ...}
    samples/NAME.jsonl one line a unit: id, score, weight, type, answer, target, group
    tasks/NAME.json    a finished task; a run that was stopped goes on with the tasks that have none
    routing.json       what routing is worth, winners found, expert use, for mixtures of experts
    lmms_eval/         lmms-eval's own files;  eval.log: its output;  run/: config and manifest
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from llava_compete.errors import UserError
from llava_compete.evaluation.checkpoint_facts import checkpoint_facts
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.lmms.catalogue import check_names, check_on_disk, names_in
from llava_compete.evaluation.lmms.launcher import run_lmms_eval
from llava_compete.evaluation.lmms.output_files import finished, of_other_code, read_run, write_task
from llava_compete.evaluation.lmms.plugin import check_registered
from llava_compete.evaluation.lmms.suites import (
    LocalTask,
    beside_their_data,
    check_judges,
    check_local_data,
    find_local_tasks,
    load_suite,
    task_digest,
)
from llava_compete.files import write_json
from llava_compete.manifest import package_versions, write_manifest

log = logging.getLogger(__name__)


class EvaluationError(Exception):
    """No benchmark could be evaluated; `failures` holds a reason for each."""

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__("; ".join(f"{task}: {reason}" for task, reason in failures.items()))
        self.failures = failures


class _Plan(NamedTuple):
    """tasks: in the order of the suite; local: those with data on this disk; digests: of local data and of our task
    YAMLs; states: by task all that a finished one must have in common with this run."""

    tasks: list[str]
    local: dict[str, LocalTask]
    digests: dict[str, str]
    states: dict[str, dict[str, Any]]


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate and return what summary.json holds.

    A benchmark that fails does not keep the others from being run: its reason is in `failures`. `EvaluationError` if
    none is left.
    """
    started = time.perf_counter()
    config = config.model_copy(update={"include_path": str(beside_their_data(Path(config.include_path)))})
    checkpoint = checkpoint_facts(Path(config.checkpoint), Path(config.adapter) if config.adapter else None)
    plan = _checked_plan(config, checkpoint)
    digest = _combined(plan.digests)
    extra = {"tasks": plan.digests}
    write_manifest(config.directory, config, seeds={"lmms_eval": 0}, data_digest=digest, extra=extra)
    summaries, failures = _run_missing(config, plan)
    if not summaries:
        raise EvaluationError(failures)
    summary = {
        "tasks": summaries,
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": checkpoint,
        "settings": config.model_dump(mode="json"),
        "versions": package_versions(),
    }
    write_json(config.directory / "summary.json", summary)
    return summary


def _checked_plan(config: EvalConfig, checkpoint: dict[str, Any]) -> _Plan:
    """What to run; names, judges and data that would fail later are a `UserError` now."""
    include_path = Path(config.include_path)
    tasks = list(dict.fromkeys(config.tasks or load_suite(config.suite or "").tasks))
    local = find_local_tasks(include_path)
    check_names(tasks, include_path)
    check_judges(tasks)
    for task in tasks:
        if task in local:
            check_local_data(local[task])
    check_on_disk(tasks, include_path)
    own = names_in(sorted(include_path.rglob("*.yaml")))
    digests = {task: local[task].digest if task in local else task_digest(own[task]) for task in tasks if task in own}
    weights = {key: checkpoint[key] for key in ("sha256", "adapter_sha256")}
    settings = {"checkpoint": weights, **_settings(config), "versions": _versions()}
    return _Plan(tasks, local, digests, {task: {**settings, "task": digests.get(task, task)} for task in tasks})


def _run_missing(config: EvalConfig, plan: _Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """Run what is not finished; summaries by finished task in the plan's order, and reasons by task that failed."""
    directory = config.directory
    remaining = [task for task in plan.tasks if finished(directory, task, plan.states[task]) is None]
    kept = [task for task in plan.tasks if task not in remaining]
    if kept:
        log.info("finished before, not run again: %s", ", ".join(kept))
    if older := of_other_code(directory, kept):
        log.warning(
            "scored before the last change of our own code, and kept: %s; to have one anew, remove its file in %s",
            *(", ".join(older), directory / "tasks"),
        )
    if remaining:
        check_registered()
        # A summary of other results must not stand beside half-made new ones.
        for name in ("summary.json", "routing.json"):
            (directory / name).unlink(missing_ok=True)
    failures: dict[str, str] = {}
    groups = _groups(remaining, plan.local)
    while groups:
        group = groups.pop(0)
        try:
            _run_group(config, plan, group)
        except UserError as error:
            if len(group) > 1:  # which of them fails shows when each has a start of its own
                log.info("not finished together, so each on its own: %s", error)
                groups = [[task] for task in group if finished(directory, task, plan.states[task]) is None] + groups
            else:
                failures[group[0]] = str(error)
                log.error("%s: %s", group[0], error)
    summaries = {task: finished(directory, task, plan.states[task]) for task in plan.tasks}
    return {task: summary for task, summary in summaries.items() if summary is not None}, failures


def _run_group(config: EvalConfig, plan: _Plan, group: list[str]) -> None:
    """One start of lmms-eval, and the score files of its tasks."""
    raw = config.directory / "lmms_eval" / "+".join(group)
    shutil.rmtree(raw, ignore_errors=True)
    log.info("lmms-eval: %s", ", ".join(group))
    # `datasets` knows a converted local table by file name and time: one that was rebuilt gets a cache of its own.
    cache = raw.with_name("datasets-" + _combined(plan.digests)[:16]) if group[0] in plan.local else None
    try:
        run_lmms_eval(config, group, raw, config.directory / "eval.log", cache)
    finally:
        if cache is not None:
            shutil.rmtree(cache, ignore_errors=True)
    for task, run in read_run(raw, group).items():
        facts = plan.local[task].facts if task in plan.local else {}
        write_task(config.directory, task, run, facts, plan.states[task])


def _settings(config: EvalConfig) -> dict[str, Any]:
    """The settings that may change a score; the others do not make a finished task stale."""
    return {
        "limit": config.limit,
        "dtype": config.dtype,
        "competition_at_inference": config.competition_at_inference,
    }


def _versions() -> dict[str, str]:
    versions = package_versions()
    return {
        name: versions[name] for name in ("llava_compete", "lmms-eval", "torch", "transformers") if name in versions
    }


def _groups(tasks: list[str], local: dict[str, LocalTask]) -> list[list[str]]:
    """Our small tasks share one start of lmms-eval; a benchmark has its own, so that a suite is resumed by task."""
    own = [task for task in tasks if task in local]
    return [*([own] if own else []), *([task] for task in tasks if task not in local)]


def _combined(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
