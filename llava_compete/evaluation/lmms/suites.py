"""Suites (eval/suites/*.yaml) and where a task's data are. Task names are lmms-eval's own or those of eval/tasks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from llava_compete import shipped
from llava_compete.config import StrictConfig, load_config
from llava_compete.errors import UserError, did_you_mean
from llava_compete.evaluation.config import EVAL_ROOT


class LeftOut(StrictConfig):
    """Why a task is not run by default, and the environment variable with its judge's key, if a judge is the reason."""

    why: str = Field(description="the reason that is shown")
    judge_key: str | None = Field(
        default=None, description="environment variable with the judge's key, where a judge is the reason"
    )


class Suite(StrictConfig):
    """Tasks that are run, and tasks that belong to the suite but are not run by default."""

    tasks: list[str] = Field(description="lmms-eval's own names or those of eval/tasks")
    left_out: dict[str, LeftOut] = Field(
        default={}, description="tasks that belong to the suite but are not run by default"
    )


@dataclass(frozen=True)
class LocalTask:
    """A task of ours whose data files are on this disk.

    Attributes:
        name: the task's name.
        files: its data files.
        digest: SHA-256 over the task's YAML, the Python files beside it (which score) and the content of the files.
        facts: its entry in meta.json beside the data (chance, n...), empty without one.
        build: the command that makes the files, if the YAML's metadata name it.
    """

    name: str
    files: tuple[Path, ...]
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)
    build: str = ""


def load_suite(name: str) -> Suite:
    """Read eval/suites/NAME.yaml, or the file at a path that ends in .yaml."""
    path = Path(name) if name.endswith(".yaml") else EVAL_ROOT / "suites" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (EVAL_ROOT / "suites").glob("*.yaml"))
        raise UserError(f"suite {name!r}: no file {path}{did_you_mean(name, known)}; known suites: {', '.join(known)}")
    return load_config(Suite, path)


def judged_tasks() -> dict[str, LeftOut]:
    """Tasks of the suites that ask a judge."""
    suites = [load_config(Suite, path) for path in sorted((EVAL_ROOT / "suites").glob("*.yaml"))]
    return {task: left_out for suite in suites for task, left_out in suite.left_out.items() if left_out.judge_key}


def check_judges(tasks: Iterable[str]) -> None:
    """A task whose judge has no key is a `UserError`: lmms-eval would ask in vain and then count answers as wrong."""
    for task, left_out in judged_tasks().items():
        if task in tasks and not os.environ.get(left_out.judge_key or ""):
            raise UserError(f"task {task!r}: {left_out.why}; {left_out.judge_key} is not set")


def beside_their_data(include_path: Path) -> Path:
    """The folder whose task YAMLs to run: `include_path`, but of an installed wheel's own tasks a copy.

    They name their data as ../../playground/data/...; from outputs/eval_tasks of the working directory these paths lead
    to its own playground, where `llava-compete data` puts the files.
    """
    own = EVAL_ROOT / "tasks"
    if not shipped.is_copy() or include_path.resolve() != own.resolve():
        return include_path
    copy = Path("outputs") / "eval_tasks"
    shutil.copytree(own, copy, dirs_exist_ok=True)
    return copy


def find_local_tasks(include_path: Path) -> dict[str, LocalTask]:
    """Tasks in a folder of YAMLs whose `data_files` are local; a file that is missing is reported when it is needed."""
    found = {}
    for path in sorted(include_path.rglob("*.yaml")):
        content = read_task_yaml(path)
        data_files = (content.get("dataset_kwargs") or {}).get("data_files")
        if isinstance(content.get("task"), str) and data_files:
            files = tuple((path.parent / name).resolve() for name in _leaves(data_files))
            build = (content.get("metadata") or {}).get("build", "")
            found[content["task"]] = LocalTask(
                content["task"], files, task_digest(path, files), _facts(content, files), build
            )
    return found


def check_local_data(task: LocalTask) -> None:
    """A missing file, or one that is not what meta.json says, is a `UserError`."""
    for file in task.files:
        if not file.is_file():
            hint = f"; build it with: {task.build}" if task.build else ""
            raise UserError(f"{file}: data of task {task.name} is missing{hint}")
    expected = task.facts.get("sha256")
    if expected and hashlib.sha256(task.files[0].read_bytes()).hexdigest() != expected:
        hint = f"; rebuild it with: {task.build} --force" if task.build else ""
        raise UserError(f"{task.files[0]}: not the file that meta.json beside it describes (SHA-256 differs){hint}")


class _TaskLoader(yaml.SafeLoader):
    """Reads lmms-eval's task YAMLs without importing the functions they name."""


_TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_task_yaml(path: Path) -> dict[str, Any]:
    """A task's YAML with its includes; functions stay names."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader) or {}
    include = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in reversed([include] if isinstance(include, str) else include):
        merged.update(read_task_yaml(path.parent / name))
    return {**merged, **content}


def _leaves(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]


def task_digest(path: Path, files: tuple[Path, ...] = ()) -> str:
    """See `LocalTask.digest`."""
    digest = hashlib.sha256(json.dumps(read_task_yaml(path), sort_keys=True).encode())
    for file in (*sorted(path.parent.glob("*.py")), *files):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _facts(content: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    meta = files[0].parent / "meta.json"
    return json.loads(meta.read_text()).get("tasks", {}).get(content["task"], {}) if meta.is_file() else {}
