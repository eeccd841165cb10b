"""Six sources of bytes that a machine with Python and PyTorch has: Python, C++, English, JSON, Perl, tests.

Python and English (docstrings and comments) are the standard library, tests its own test suite, C++ PyTorch's headers,
JSON the syntax trees of modules of the standard library. Perl is the machine's /usr/share/perl; where there is none,
PyTorch's type stubs take its place, and where Python came without its tests, the tests of PyTorch's tools. Which it was
is said with the result (`origins`). A fixed share of the files, by a hash of their names, is held out.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llava_compete.demo.stdlib_text import extract_prose
from llava_compete.errors import UserError

TRAIN_BYTES, HELD_OUT_BYTES = 400_000, 50_000
_HELD_OUT_PERCENT = 12


class Source(NamedTuple):
    """One source's bytes, and where they are from."""

    name: str
    origin: str
    train: bytes
    held_out: bytes


def read_sources(train_bytes: int = TRAIN_BYTES, held_out_bytes: int = HELD_OUT_BYTES) -> list[Source]:
    """The six; `UserError` where one has less than half of the bytes."""
    wanted = {"train": train_bytes, "held_out": held_out_bytes}
    library = Path(sysconfig.get_paths()["stdlib"])
    package = Path(torch.__file__).parent
    tests = library / "test"
    perl = Path("/usr/share/perl")
    code = sorted(library.glob("*.py")) + sorted((library / "asyncio").glob("*.py"))
    return [
        _source("Python", code, "standard library", _plain, wanted),
        _source("C++", sorted((package / "include" / "ATen").rglob("*.h")), "PyTorch's headers", _plain, wanted),
        _source(
            "English", sorted(library.glob("[a-su-z]*/*.py")) + code, "standard library's prose", extract_prose, wanted
        ),
        _source("JSON", code, "syntax trees of the standard library", _tree, wanted),
        _source("Perl", sorted(perl.rglob("*.p[lm]")), "/usr/share/perl", _plain, wanted)
        if perl.is_dir()
        else _source("Perl", sorted(package.rglob("*.pyi")), "in place of Perl: PyTorch's type stubs", _plain, wanted),
        _source("tests", sorted(tests.glob("test_*.py")), "standard library's tests", _plain, wanted)
        if tests.is_dir()
        else _source("tests", sorted((package / "testing").rglob("*.py")), "PyTorch's testing helpers", _plain, wanted),
    ]


def origins() -> dict[str, str]:
    """Where each source's bytes are from on this machine."""
    return {source.name: source.origin for source in read_sources(2_000, 500)}


def _source(name: str, files: list[Path], origin: str, convert: Callable[[str], str], wanted: dict[str, int]) -> Source:
    splits = {"train": bytearray(), "held_out": bytearray()}
    for path in _shuffled(files):
        if all(len(splits[split]) >= wanted[split] for split in splits):
            break
        held_out = zlib.crc32(path.name.encode()) % 100 < _HELD_OUT_PERCENT
        split = "held_out" if held_out else "train"
        if len(splits[split]) < wanted[split]:
            splits[split] += convert(path.read_text(encoding="utf-8", errors="replace")).encode("utf-8", "replace")
    for split, found in splits.items():
        if len(found) < wanted[split] // 2:
            raise UserError(
                f"bytes: found {len(found):,} {split} bytes of {name} ({origin}), expected {wanted[split] // 2:,}"
            )
    return Source(name, origin, *(bytes(splits[split][: wanted[split]]) for split in ("train", "held_out")))


def _shuffled(files: list[Path]) -> Iterator[Path]:
    """By a hash of the name, so that the first bytes are not all of files that begin with an a."""
    yield from sorted(files, key=lambda path: (zlib.crc32(path.name.encode()[::-1]), str(path)))


def _plain(text: str) -> str:
    return text


def _tree(text: str) -> str:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    return json.dumps([_node(statement) for statement in tree.body], indent=1, default=str)


def _node(value: object) -> object:
    if isinstance(value, ast.AST):
        fields = {name: _node(field) for name, field in ast.iter_fields(value) if field not in (None, [])}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list):
        return [_node(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else repr(value)
