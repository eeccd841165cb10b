"""Every key of the YAML files as a table: key, type, default and meaning, from the config classes themselves."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError, did_you_mean
from llava_compete.evaluation.config import EvalConfig
from llava_compete.evaluation.lmms.suites import Suite
from llava_compete.evaluation.text.harness import LmSuite
from llava_compete.model.upcycle import UpcycleConfig
from llava_compete.train.config import TrainConfig

# A YAML file by its kind; the keys of a stage come first and need no prefix to be looked up.
FILES: dict[str, type[StrictConfig]] = {
    "stage": TrainConfig,
    "upcycle": UpcycleConfig,
    "eval": EvalConfig,
    "suite": Suite,
    "lm_suite": LmSuite,
}
TITLES = {
    "stage": "A training stage (`configs/*/{pretrain_align,pft,sft}.yaml`, `configs/lm/*.yaml`)",
    "upcycle": "Upcycling (`configs/*/upcycle.yaml`); `model` and `moe` as in a stage",
    "eval": "Evaluation (`configs/*/eval.yaml`)",
    "suite": "A suite of benchmarks (`eval/suites/*.yaml`)",
    "lm_suite": "A suite of text tasks (`eval/lm_suites/*.yaml`)",
}


class Row(NamedTuple):
    """One key."""

    key: str
    type: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The keys of one mapping; `paths` are the places below the top of its file where it can stand, "" for the top."""

    paths: list[str]
    what: str
    rows: list[Row]


def sections(config: type[StrictConfig]) -> list[Section]:
    """The file's own keys, then those of each section in it, depth first."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, below in _walk(config, ""):
        places.setdefault(below, []).append(path)
    return [_section(below, paths) for below, paths in places.items()]


def _walk(config: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, config
    for name, field in config.model_fields.items():
        for below, suffix in _models(field.annotation):
            yield from _walk(below, f"{path}.{name}{suffix}".lstrip("."))


def _section(config: type[BaseModel], paths: list[str]) -> Section:
    what = (config.__doc__ or "").strip().split("\n\n")[0]
    rows = [
        Row(name, _name(field.annotation), _default(field), field.description or "")
        for name, field in config.model_fields.items()
    ]
    return Section(paths, " ".join(what.split()), rows)


def _models(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Sections inside an annotation, and how each is written below its key."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        arguments = arguments[:1]
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        yield annotation, ""
    suffix = "[]" if origin is list else ".<name>" if origin is dict else ""
    for argument in arguments:
        yield from ((model, suffix + below) for model, below in _models(argument))


def _name(annotation: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(argument) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain = {str: "text", int: "whole number", float: "number", bool: "true, false", Path: "path"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "" if field.default_factory is None else "{}"
    if isinstance(value, BaseModel):
        return "its own"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Path | str) and str(value).startswith("/"):
        return "the package's own"
    if isinstance(value, tuple | list):
        return str([round(item, 4) if isinstance(item, float) else item for item in value])
    return str(value.value if isinstance(value, enum.Enum) else value)


def find(name: str) -> list[Section]:
    """The sections of a file kind, or of a key of a stage such as `moe.language` or `training`.

    Raises:
        UserError: no such section; names the nearest.
    """
    if name in FILES:
        return sections(FILES[name])
    stage = sections(TrainConfig)
    below = (f"{name}.", f"{name}[")
    found = [item for item in stage if any(path == name or path.startswith(below) for path in item.paths)]
    if not found:
        known = {*FILES, *(path for item in stage for path in item.paths if path)}
        hint = did_you_mean(name, known) or f"; there are {', '.join(sorted(known))}"
        raise UserError(f"section {name!r}: found none of this name{hint}")
    return found


def to_markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Config reference",
        "",
        "Every key of the YAML files, written by `llava-compete config --markdown docs/config.md`. `[]` stands for",
        "each entry of a list, `<name>` for each name of a mapping; any key can be set on the command line, such as",
        "`training.learning_rate=1e-3` or `data.sources.0.weight=0.5`.",
    ]
    for kind, config in FILES.items():
        lines += ["", f"## {TITLES[kind]}"]
        for section in sections(config):
            if kind == "upcycle" and section.paths != [""]:
                continue
            places = ", ".join(f"`{path}`" for path in section.paths if path)
            lines += ["", f"### {places or 'Top level'}", "", section.what, ""]
            lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            cells = [[f"`{row.key}`", *row[1:]] for row in section.rows]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"
