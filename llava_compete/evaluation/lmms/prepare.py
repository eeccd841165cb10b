"""Fetch what a suite needs while there is a network, and prove that it then runs without one.

For each task lmms-eval itself builds the task and shows its first document (some fetch further files only then): once
online, once with the network switched off.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from llava_compete.errors import UserError
from llava_compete.evaluation.lmms.catalogue import check_names, data_sets
from llava_compete.evaluation.lmms.launcher import ended_by_signals

log = logging.getLogger(__name__)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class Prepared(NamedTuple):
    """A task and its number of documents, or what went wrong."""

    task: str
    documents: int
    error: str | None


def prepare(tasks: list[str], include_path: Path, offline_only: bool = False) -> list[Prepared]:
    """Fetch and verify each task's data; `offline_only` verifies what is there."""
    check_names(tasks, include_path)
    results = []
    for task in tqdm(tasks, desc="data sets", unit="task"):
        fetched = None if offline_only else _load(task, include_path, {})
        verified = fetched if fetched is not None and fetched.error else _load(task, include_path, OFFLINE)
        if verified.error is None:
            log.info("%s: %s documents, ready offline", task, f"{verified.documents:,}")
        results.append(verified)
    return results


def _load(task: str, include_path: Path, environment: dict[str, str]) -> Prepared:
    words = [sys.executable, "-m", "llava_compete.evaluation.lmms.prepare", task, str(include_path)]
    ours = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    with ended_by_signals():  # `run` then ends the process that loads, instead of leaving it behind
        done = subprocess.run(words, capture_output=True, text=True, env={**ours, **environment}, check=False)
    if done.returncode == 0:
        return Prepared(task, json.loads(done.stdout.splitlines()[-1])["documents"], None)
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    return Prepared(task, 0, f"data set {' and '.join(data_sets(task, include_path))}: {lines[-1].strip()}")


def count_documents(task: str, include_path: Path) -> int:
    """Build a task as lmms-eval does and show its first document; returns the number of documents."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=str(include_path), model_name="llava_compete")
    total = 0
    for output in get_task_list(get_task_dict([task], manager, "simple")):
        document = output.task.eval_docs[0]
        output.task.doc_to_text(document)
        output.task.doc_to_visual(document)
        total += len(output.task.eval_docs)
    if total == 0:
        raise UserError(f"task {task!r} has no documents")
    return total


def _main() -> None:
    from tenacity import RetryError

    try:
        number = count_documents(sys.argv[1], Path(sys.argv[2]))
    except RetryError as error:  # lmms-eval tries again several times, and then only says that it did
        reason = error.last_attempt.exception()
        sys.exit(f"{type(reason).__name__}: {' '.join(str(reason).split())}")
    sys.stdout.write(json.dumps({"documents": number}) + "\n")


if __name__ == "__main__":
    _main()
