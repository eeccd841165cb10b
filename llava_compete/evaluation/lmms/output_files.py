"""From lmms-eval's output files to one score file a task and one summary a run.

lmms-eval exits with status 0 when an evaluation failed, and names its files by time; this module is the one place that
knows those files. Per-sample lines written here are what `evaluation.compare` joins.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.evaluation.lmms.documents import add_documents, read_documents
from llava_compete.evaluation.unit_scores import score_samples, weighted_mean, write_units
from llava_compete.files import read_json, read_json_lines, write_json
from llava_compete.manifest import last_change

log = logging.getLogger(__name__)
# Rooms of the package that an answer or its score goes through.
CODE = ("evaluation", "language", "model", "moe", "vision")


def read_run(raw: Path, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """Metrics and samples by task from one lmms-eval output folder; incomplete output is a `UserError`.

    Samples have a `group` (see `documents`) beside what lmms-eval wrote.
    """
    files = sorted(raw.rglob("*_results.json"))
    if len(files) != 1:
        raise UserError(f"{raw}: found {len(files)} results files of lmms-eval, expected 1: the evaluation failed")
    results = read_json(files[0])
    prefix = files[0].name.removesuffix("_results.json")
    documents = read_documents(raw)
    found = {}
    for task in tasks:
        members = _leaves(task, results.get("group_subtasks", {}))
        samples_files = {member: files[0].with_name(f"{prefix}_samples_{member}.jsonl") for member in members}
        missing = [file.name for file in samples_files.values() if not file.is_file()]
        if task not in results["results"] or missing:
            raise UserError(f"{raw}: lmms-eval wrote no result or no samples of {task!r} (missing: {missing})")
        samples: list[dict[str, Any]] = []
        asked = {}
        for member, file in samples_files.items():
            lines = read_json_lines(file)
            # Ranks write one after another; documents are put back in order, and none may be missing.
            by_document: dict[int, dict[str, Any]] = {}
            for sample in sorted(lines, key=lambda sample: sample["doc_id"]):
                by_document.setdefault(sample["doc_id"], sample)  # a task with several filters has a line for each
            expected = results["n-samples"][member]["effective"]
            if len(by_document) != expected:
                raise UserError(f"{file}: answers to {len(by_document)} documents, expected {expected}")
            asked[member] = add_documents(member, by_document.values(), documents)
            member_name = {"member": member} if len(members) > 1 else {}
            samples += [{**sample, **member_name} for sample in by_document.values()]
        config = results["configs"].get(task, {})
        found[task] = {
            "metrics": _numbers(results["results"][task]),
            "samples": samples,
            "generation": config.get("generation_kwargs"),
            "asked": "+".join(asked.values()),
            "lmms_eval_version": results["versions"].get(task),
        }
    return found


def write_task(directory: Path, task: str, run: dict[str, Any], facts: dict[str, Any], state: dict[str, Any]) -> None:
    """Write samples/TASK.jsonl and then tasks/TASK.json, whose presence says that the task is finished."""
    try:
        units = score_samples(task, run["samples"])
    except UserError as error:  # its metrics are kept, but it cannot be compared sample by sample
        log.warning("%s; only the metrics of lmms-eval are kept", error)
        units = []
    write_units(directory, task, units)
    summary = {
        "accuracy": weighted_mean(units) if units else None,
        **({"chance": facts["chance"], "blind": facts["blind"]} if "chance" in facts else {}),
        "n": len(units) or len(run["samples"]),
        "by_type": _by_type(units),
        "metrics": run["metrics"],
        "generation": run["generation"],
        "task_version": run["lmms_eval_version"],
        "data": state["task"],
        "asked": run["asked"],
    }
    write_json(directory / "tasks" / f"{task}.json", {"state": state, "code": last_change(*CODE), "summary": summary})


def finished(directory: Path, task: str, state: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a task that was finished earlier with the same checkpoint, data and settings; else None."""
    path = directory / "tasks" / f"{task}.json"
    if not path.is_file() or not (directory / "samples" / f"{task}.jsonl").is_file():
        return None
    content = read_json(path)
    return content["summary"] if content["state"] == state else None


def of_other_code(directory: Path, tasks: Iterable[str]) -> list[str]:
    """Of finished tasks, those that were scored before our own code last changed, as far as both commits are known.

    They stay finished: most changes move no score, and a suite takes hours.
    """
    now = last_change(*CODE)
    then = {task: read_json(directory / "tasks" / f"{task}.json").get("code") for task in tasks}
    return [task for task, code in then.items() if None not in (code, now) and code != now]


def _leaves(task: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, whose members may be groups; a task alone is its own."""
    return [leaf for member in members[task] for leaf in _leaves(member, members)] if members.get(task) else [task]


def _by_type(units: list[Any]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for unit in units:
        if unit.type is not None:
            groups[unit.type].append(unit)
    return {
        name: {"accuracy": sum(unit.score for unit in group) / len(group), "n": len(group)}
        for name, group in sorted(groups.items())
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The numeric metrics of a task, without the filter's name where it is lmms-eval's default."""
    return {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
