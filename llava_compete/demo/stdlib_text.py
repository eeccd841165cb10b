"""Real text that every machine has: documentation strings and comments of Python's standard library.

One document a module: its docstrings and comment blocks in the order of the source. A fixed share of the modules, by
a hash of their names, is the held-out shard. The text depends on the Python version, which `meta.json` records.
"""

from __future__ import annotations

import ast
import io
import json
import platform
import sysconfig
import tokenize
import zlib
from pathlib import Path
from typing import NamedTuple

from llava_compete.files import write_bytes, write_json

VALIDATION_PERCENT = 8
_MIN_CHARS = 200
# Tests say little in words, character tables say the same in each file, installed packages differ by machine.
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}


class Summary(NamedTuple):
    """What was written: documents and UTF-8 bytes of each split."""

    train_documents: int
    train_bytes: int
    validation_documents: int
    validation_bytes: int


def build_stdlib_text(directory: Path, library: Path | None = None) -> Summary:
    """Write train.jsonl, validation.jsonl and meta.json into `directory`; `library` is for tests."""
    root = library or Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        text = extract_prose(path.read_text(encoding="utf-8", errors="ignore"))
        if len(text) >= _MIN_CHARS:
            held_out = zlib.crc32(name.encode()) % 100 < VALIDATION_PERCENT
            rows["validation" if held_out else "train"].append({"id": name, "text": text})
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split, documents in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in documents]
        path = directory / f"{split}.jsonl"
        # A docstring may escape half a surrogate pair, which UTF-8 cannot hold.
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        sizes[split] = sum(len(row["text"].encode("utf-8", "replace")) for row in documents)
    summary = Summary(len(rows["train"]), sizes["train"], len(rows["validation"]), sizes["validation"])
    meta = summary._asdict() | {"python": platform.python_version()}
    write_json(directory / "meta.json", meta)
    return summary


def extract_prose(source: str) -> str:
    """Docstrings and comment blocks of a module in source order, blank lines between; "" if it does not parse."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return ""
    pieces: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and node.body:
                pieces[node.body[0].lineno] = text
    block: list[str] = []
    start = last = -1
    for token in tokens:
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1 and block:
            pieces[start] = "\n".join(block)
            block = []
        if not block:
            start = line
        block.append(token.string.lstrip("#!").strip())
        last = line
    if block:
        pieces.setdefault(start, "\n".join(block))
    return "\n\n".join(text for _, text in sorted(pieces.items()) if text.strip())
