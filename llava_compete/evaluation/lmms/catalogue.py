"""What lmms-eval has: its task names and the data sets behind them, read from its YAML files without importing it.

Importing lmms-eval and its tasks takes 10 seconds and more; a wrong name or a missing data set should be said at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from llava_compete.errors import UserError, nearest
from llava_compete.evaluation.lmms.suites import read_task_yaml

# A tag stands for the tasks that carry it, which share their data set.
_NAME = re.compile(r"""^["']?(?:task|group|tag)["']?:\s*["']?([\w.+-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
# Builders of `datasets` that read plain files: nothing to fetch.
_FILE_BUILDERS = {"parquet", "json", "csv", "text", "arrow", "imagefolder"}


@cache
def lmms_eval_tasks() -> dict[str, Path]:
    """Task, group and tag names of the installed lmms-eval, with a YAML that defines each."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lmms-eval is not installed; install the extra: pip install 'llava_compete[eval]'")
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    return names_in(sorted(folder.rglob("*.yaml")))


def names_in(files: Iterable[Path]) -> dict[str, Path]:
    """Names that task YAMLs define."""
    found: dict[str, Path] = {}
    for file in files:
        for name in _NAME.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, file)
    return found


def check_names(tasks: Iterable[str], include_path: Path) -> None:
    """Names that neither lmms-eval nor `include_path` has are a `UserError` with near names."""
    known = lmms_eval_tasks().keys() | names_in(include_path.rglob("*.yaml")).keys()
    for task in tasks:
        if task not in known:
            near = nearest(task, known)
            hint = f"did you mean {', '.join(near)}?" if near else "list them with: python -m lmms_eval --tasks list"
            raise UserError(f"task {task!r}: not one of lmms-eval's nor of {include_path}; {hint}")


def data_sets(task: str, include_path: Path) -> list[str]:
    """Hub names of the data sets that a task (or the tasks of a group) reads; none for local files."""
    files = {**names_in(include_path.rglob("*.yaml")), **lmms_eval_tasks()}
    if task not in files:
        return []
    content = read_task_yaml(files[task])
    members = content.get("task")
    if isinstance(members, list):
        names = [member["task"] if isinstance(member, dict) else member for member in members]
        return sorted({name for member in names if member != task for name in data_sets(member, include_path)})
    path = content.get("dataset_path")
    return [path] if isinstance(path, str) and path not in _FILE_BUILDERS else []


def check_on_disk(tasks: Iterable[str], include_path: Path) -> None:
    """A data set that is neither cached nor in a folder of its name is a `UserError`: runs use no network."""
    for task in tasks:
        for name in data_sets(task, include_path):
            if not any(place.exists() for place in _places(name)):
                raise UserError(
                    f"task {task!r}: its data set {name} is not on this machine, and evaluation uses no network; "
                    f"fetch it first with: llava-compete eval prepare --tasks {task} (or see eval/offline)"
                )


def _places(name: str) -> list[Path]:
    """Where a data set of the hub may be: a folder of that name, the hub's cache, the cache of converted tables."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    tables = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    lower = name.replace("/", "___")
    return [Path(name), hub / f"datasets--{name.replace('/', '--')}", tables / lower, tables / lower.lower()]
