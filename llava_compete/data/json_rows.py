"""Rows of JSON files: one list (`.json`) or one row a line (`.jsonl`, and `.json` files that hold lines)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_compete.data.compressed import open_text
from llava_compete.data.row_errors import RecordError
from llava_compete.data.row_turns import TURNS
from llava_compete.data.strict_json import DECODER, UNDECODABLE, KeyTwiceError, undecodable

_CHUNK = 1 << 20  # characters
_MAX_DEPTH = 50  # a row has five
_QUOTED = 1000  # characters of what cannot be read that are kept


def read_json(file: Path) -> Iterator[Any]:
    """The items of a list, as they are read; or rows line by line, where the file begins with a row."""
    with _open(file) as stream:
        buffer, position = _skip_space(stream, stream.read(_CHUNK), 0)
        if buffer[position : position + 1] == "[":
            yield from _list_items(stream, file, buffer, position + 1)
            return
    if buffer[position : position + 1] == "{":
        first = next(read_json_lines(file), None)
        if isinstance(first, dict) and any(key in first for key in TURNS):
            yield from read_json_lines(file)
            return
    found = f"{buffer[position : position + 20]!r}" if buffer else "nothing"
    yield RecordError("file_unreadable", f"{file}: found {found}, expected a JSON list of rows, or one row a line")


def read_json_lines(file: Path) -> Iterator[Any]:
    """A row a line; lines end at "\\n" only, for U+2028 and its like stand unescaped inside JSON strings."""
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield shallow(DECODER.decode(line), f"{file.name}, line {number}")
            except UNDECODABLE as error:
                yield undecodable(f"{file.name}, line {number}", error, line.rstrip("\r\n"))


def shallow(item: Any, where: str) -> Any:
    """The item, or an error in its place if it is nested deeper than Python can copy between processes."""
    level = [item]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for part in level
            if isinstance(part, dict | list)
            for child in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return item
    return RecordError("not_json", f"{where}: more than {_MAX_DEPTH} levels of nesting")


def _open(file: Path) -> TextIO:
    # Bytes that are not UTF-8 become lone surrogates, which `parse_row` refuses with the row's number.
    return open_text(file, encoding="utf-8-sig", errors="surrogateescape")


def _list_items(stream: TextIO, file: Path, buffer: str, position: int) -> Iterator[Any]:
    """Items of one JSON list from behind its bracket on; after the first that is not JSON nothing can be told apart."""

    def not_json(problem: object) -> RecordError:
        rest = buffer[position : position + _QUOTED]
        return RecordError("not_json", f"{file.name}: from here on not a JSON list: {problem}", rest)

    first = True
    while True:
        buffer, position = _skip_space(stream, buffer, position)
        if buffer[position : position + 1] == "]":
            buffer, position = _skip_space(stream, buffer, position + 1)
            if buffer:
                yield not_json(f"found {buffer[position : position + 20]!r} after the list")
            return
        if not first:
            if buffer[position : position + 1] != ",":
                yield not_json(f"found {buffer[position : position + 20]!r}, expected ',' or ']'")
                return
            buffer, position = _skip_space(stream, buffer, position + 1)
        # A number at the end of the buffer could go on: an item counts once something follows it.
        while True:
            problem: Exception | None = None
            try:
                item, end = _item(file, buffer, position)
                if end < len(buffer):
                    break
            except UNDECODABLE as error:
                problem = error
            more = stream.read(max(_CHUNK, len(buffer)))
            if not more:
                break
            buffer, position = buffer[position:] + more, 0
        if problem is not None:
            yield not_json(problem)
            return
        yield item if isinstance(item, RecordError) else shallow(item, file.name)
        position, first = end, False
        if position > _CHUNK:
            buffer, position = buffer[position:], 0


def _item(file: Path, buffer: str, position: int) -> tuple[Any, int]:
    """An item, or an error in its place, and where it ends."""
    try:
        return DECODER.raw_decode(buffer, position)
    except KeyTwiceError as error:
        _, end = json.JSONDecoder().raw_decode(buffer, position)
        return undecodable(file.name, error, buffer[position : min(end, position + _QUOTED)]), end


def _skip_space(stream: TextIO, buffer: str, position: int) -> tuple[str, int]:
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n":
            position += 1
        if position < len(buffer):
            return buffer, position
        buffer, position = stream.read(_CHUNK), 0
        if not buffer:
            return "", 0
