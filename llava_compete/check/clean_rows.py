"""Rows for a file in another folder: image paths that still lead to their pictures, embedded images as files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_compete.data.config import SourceSection
from llava_compete.data.row_turns import TURNS
from llava_compete.files import write_bytes

_PART_KEYS = ("image", "path", "url")


def with_image_paths(row: Any, source: SourceSection, file: Path) -> Any:
    """A row of `source` as it must stand in `file`.

    Paths stay relative to the source's `image_folder` where it has one, for the written file is read with the same
    setting. Else they become relative to `file`. Embedded images are written to a folder beside `file`.
    """
    folder = source.image_folder or file.parent

    def moved(path: str) -> str:
        if source.image_folder is not None or "://" in path or path.startswith("data:") or Path(path).is_absolute():
            return path
        return os.path.relpath(source.images / path, folder)

    def written(content: bytes, name: str) -> str:
        return os.path.relpath(_write_image(content, Path(name).suffix, file), folder)

    row = _with_files(row, written)
    if not isinstance(row, dict):
        return row
    changed = {key: _references(row[key], moved) for key in ("image", "images") if key in row}
    changed |= {key: _turns(row[key], moved) for key in TURNS if row.get(key)}
    return {**row, **changed}


def _with_files(value: Any, write: Callable[[bytes, str], str]) -> Any:
    """The value with the path of a written file in place of each embedded one."""
    if isinstance(value, bytes):
        return _Written(write(value, ""))
    if isinstance(value, list):
        return [_with_files(item, write) for item in value]
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("bytes"), bytes):
        return _Written(write(value["bytes"], str(value.get("path") or "")))
    return {key: _with_files(item, write) for key, item in value.items()}


class _Written(str):
    """The path of a file that was just written: it is right as it is."""


def _references(value: Any, moved: Callable[[str], str]) -> Any:
    """An image field: a path, a mapping with one, or a list of them."""
    if isinstance(value, list):
        return [_references(item, moved) for item in value]
    if isinstance(value, dict):
        return {key: _references(item, moved) if key in ("path", "url") else item for key, item in value.items()}
    return moved(value) if isinstance(value, str) and value and not isinstance(value, _Written) else value


def _turns(value: Any, moved: Callable[[str], str]) -> Any:
    if isinstance(value, str):  # a column of a table that holds JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, list):
        return value
    return [
        {key: [_part(part, moved) for part in item] if isinstance(item, list) else item for key, item in turn.items()}
        if isinstance(turn, dict)
        else turn
        for turn in value
    ]


def _part(part: Any, moved: Callable[[str], str]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return part
    return {key: _references(item, moved) if key in (*_PART_KEYS, "image_url") else item for key, item in part.items()}


def _write_image(content: bytes, suffix: str, file: Path) -> Path:
    """Named by its content, so that a picture that many rows show is one file and no two checks disagree on it."""
    target = file.parent / f"{file.stem}_images" / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
    if not target.exists():
        write_bytes(target, content)
    return target
