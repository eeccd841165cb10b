"""English that every machine has: what Python's functions do (to learn from), and prose of its manual (held out)."""

from __future__ import annotations

import importlib
import inspect
import re

_MODULES = (
    "math", "random", "statistics", "textwrap", "shutil", "os", "os.path", "string", "calendar", "datetime", "json",
    "itertools", "functools", "operator", "heapq", "bisect", "copy", "glob", "fnmatch", "time", "tempfile", "csv",
    "collections", "pathlib", "argparse", "logging", "threading", "socket", "subprocess", "urllib.parse", "inspect",
    "re", "zipfile", "tarfile", "asyncio", "contextlib", "typing", "platform", "difflib", "ast", "traceback", "codecs",
    "base64",
)  # fmt: skip
_MIN_CHARS, _MAX_CHARS = 40, 220


def function_rows(count: int) -> list[tuple[str, str]]:
    """At most `count` questions "What does math.sqrt do?" with the first paragraph of the documentation."""
    rows = []
    for name in _MODULES:
        module = importlib.import_module(name)
        for key in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, key, None)
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()) if callable(value) else ""
            if not key.startswith("_") and _MIN_CHARS <= len(text) <= _MAX_CHARS and re.search(r"[a-z]\.$", text):
                rows.append((f"What does Python's {name}.{key} do?", text))
    return rows[:: max(1, len(rows) // count)][:count]


def manual_prose() -> list[str]:
    """Paragraphs of whole sentences from Python's manual (`pydoc_data.topics`), without its code and grammar."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(text.split()) for _, page in sorted(topics.items()) for text in _prose(page))
    return list(dict.fromkeys(paragraphs))


def _prose(page: str) -> list[str]:
    return [
        text
        for text in page.split("\n\n")
        if len(text) >= 200 and text[0].isupper() and text.rstrip().endswith(".") and "::" not in text
    ]
