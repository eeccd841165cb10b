"""Strict, typed YAML configs with dotted overrides.

Every component declares its own frozen `StrictConfig` next to its code; this file only reads YAML (1.2, so that
`1e-3` is a number and duplicate keys are errors), applies `key.sub=value` overrides and turns pydantic's
validation errors into one readable `UserError` that names the file, the key and the nearest valid key.
"""

from __future__ import annotations

import io
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llava_compete.errors import UserError, did_you_mean
from llava_compete.files import write_text


class StrictConfig(BaseModel):
    """Base of every config section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_path(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty text would become the current folder."""
        if value == "" and info.field_name and Path in _alternatives(cls.model_fields[info.field_name].annotation):
            raise ValueError("found '', expected a path")
        return value


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
        node: Any = content
        *parents, leaf = key.split(".")
        for parent in parents:
            node = _below(node, parent, override)
        node[_place(node, leaf, override)] = value
    return content


def _below(node: Any, name: str, override: str) -> Any:
    """The section or list at `name`; a section that is not there yet is made."""
    place = _place(node, name, override)
    if isinstance(node, dict) and node.get(place) is None:
        node[place] = {}
    if not isinstance(node[place], dict | list):
        raise UserError(f"override {override!r}: {name!r} holds {node[place]!r}, not a section with keys")
    return node[place]


def _place(node: Any, name: str, override: str) -> str | int:
    """A key of a section as it is; of a list, such as `data.sources.0.path`, the number of an entry that is there."""
    if isinstance(node, dict):
        return name
    if not (name.isdecimal() and int(name) < len(node)):
        raise UserError(
            f"override {override!r}: found {name!r}, expected the number of a list's entry below {len(node)}"
        )
    return int(name)


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path`, apply `overrides`, validate against `cls`."""
    return parse_config(cls, apply_overrides(read_yaml(path), overrides), source=str(path))


def parse_config(cls: type[ConfigT], content: dict[str, Any], source: str) -> ConfigT:
    """Validate plain data against `cls`; `source` names the file in error messages.

    `~` at the beginning of a text and `${NAME}` anywhere in it are expanded, as a shell would.
    """
    content = _expanded(content, source, ())
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explanations(cls, content, error))) from error


def _expanded(value: Any, source: str, key: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(item, source, (*key, str(name))) for name, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, source, (*key, str(number))) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def of_environment(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{source}: {'.'.join(key)}: found {value!r}, but ${match[1]} is not set")
        return os.environ[match[1]]

    value = re.sub(r"\$\{(\w+)\}", of_environment, value)
    return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value


# Kinds of error whose text by pydantic names its classes, or ours.
_EXPECTED = {"model_type": "expected a section with keys", "path_type": "expected a path"}
# How pydantic calls the members of a union, which are no part of a key: <tag>, MoeConfig, literal[False], int.
_MEMBER = re.compile(r"<|.*[\[A-Z]|(int|float|str|bool|none)$")


def _explanations(cls: type[BaseModel], content: Any, error: ValidationError) -> list[str]:
    """One phrase for each wrong key; of a union's members, those that say nothing of the value as a whole."""
    phrases: dict[str, list[str]] = {}
    for item in error.errors():
        location = _location(content, item["loc"])
        phrases.setdefault(".".join(location), []).append(_explain(cls, item, location))
    whole = [key for key in phrases if not any(other.startswith(f"{key}.") for other in phrases)]
    return [_either(list(dict.fromkeys(phrases[key]))) for key in whole]


def _either(phrases: list[str]) -> str:
    """`key: found 5: expected this` and `key: found 5: expected that` in one."""
    first, *rest = phrases
    return " or ".join([first, *(phrase.rpartition(": ")[2] for phrase in rest)])


def _location(content: Any, parts: Sequence[str | int]) -> list[str]:
    """The keys that lead to a wrong value."""
    location: list[str] = []
    for part in parts:
        held = content if isinstance(content, dict) else dict(enumerate(content)) if isinstance(content, list) else {}
        if part in held:
            content = held[part]
        elif _MEMBER.match(str(part)):
            continue
        else:  # missing, or written by a validator
            content = None
        location.append(str(part))
    return location


def _explain(cls: type[BaseModel], item: Any, location: Sequence[str]) -> str:
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = _keys_at(cls, location[:-1])
        hint = did_you_mean(location[-1], valid) or (f"; valid keys: {', '.join(valid)}" if valid else "")
        return f"unknown key {key!r}{hint}"
    if item["type"] == "missing":
        return f"missing key {key!r}"
    message = _EXPECTED.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    if not key or message.startswith((f"{key}.", f"{key}:")):
        return message
    if isinstance(item["input"], dict | list) or item["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: found {item['input']!r}: {message}"


def _keys_at(cls: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the section that `location` points to."""
    current: list[Any] = [cls]
    for part in location:
        found = [m for item in current for m in _models(item)]
        # A list index keeps the current candidates.
        following = [model.model_fields[part].annotation for model in found if part in model.model_fields]
        current = following or current
    return sorted({name for item in current for model in _models(item) for name in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Config classes inside an annotation such as `dict[str, Section] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models(argument)]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
