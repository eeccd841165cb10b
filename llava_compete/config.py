"""Strict, typed YAML configs with dotted overrides.

Every component declares its own frozen `StrictConfig` next to its code; this file only reads YAML (1.2, so that
`1e-3` is a number and duplicate keys are errors), applies `key.sub=value` overrides and turns pydantic's
validation errors into one readable `UserError` that names the file, the key and the nearest valid key.
"""

from __future__ import annotations

import io
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llava_compete.errors import UserError, did_you_mean
from llava_compete.files import write_text


class StrictConfig(BaseModel):
    """Base of every config section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping; a missing, unparseable or non-mapping file is a `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys at the top level, found {type(content).__name__}")
    return content


def dump_yaml(content: Any, path: str | Path) -> None:
    """Write plain data (or a config) as YAML, so that a reader never sees half a file."""
    if isinstance(content, BaseModel):
        content = content.model_dump(mode="json")
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(content, text)
    write_text(path, text.getvalue())


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `content` with dotted overrides such as `training.learning_rate=1e-3` applied; values are YAML."""
    content = _copy(content)
    for override in overrides:
        key, separator, raw = override.partition("=")
        if not separator or not key or any(not part for part in key.split(".")):
            raise UserError(f"override {override!r}: expected key.subkey=value")
        try:
            value = YAML(typ="safe", pure=True).load(io.StringIO(raw))
        except YAMLError as error:
            raise UserError(f"override {override!r}: value is not valid YAML") from error
        node = content
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"override {override!r}: {parent!r} holds {child!r}, not a section with keys")
            node = child
        node[leaf] = value
    return content


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `overrides`, validate against `cls`."""
    return parse_config(cls, apply_overrides(read_yaml(path), overrides), source=str(path))


def parse_config(cls: type[ConfigT], content: dict[str, Any], source: str) -> ConfigT:
    """Validate plain data against `cls`; `source` names the file in error messages."""
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(cls, item) for item in error.errors())) from error


def _explain(cls: type[BaseModel], item: Any) -> str:
    # Tags of discriminated unions are written <tag> and are no part of the key.
    location = [str(part) for part in item["loc"] if not str(part).startswith("<")]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = _keys_at(cls, location[:-1])
        hint = did_you_mean(location[-1], valid) or (f"; valid keys: {', '.join(valid)}" if valid else "")
        return f"unknown key {key!r}{hint}"
    if item["type"] == "missing":
        return f"missing key {key!r}"
    message = item["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if isinstance(item["input"], dict | list) or item["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: found {item['input']!r}: {message}"


def _keys_at(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the section that `location` points to."""
    current: list[Any] = [cls]
    for part in location:
        found = [m for item in current for m in _models(item)]
        # A location may contain the tag of a union member or a list index: those keep the current candidates.
        following = [model.model_fields[part].annotation for model in found if part in model.model_fields]
        current = following or current
    return sorted({name for item in current for model in _models(item) for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Config classes inside an annotation such as `dict[str, Section] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
