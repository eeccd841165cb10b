"""What is wrong with a row, by name, and how a found value is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_compete.errors import UserError


class RecordError(UserError):
    """A row that cannot be used; `kind` is the checker's name for the problem.

    `text` is what stands in the file in place of a row that could not be read.
    """

    def __init__(self, kind: str, message: str, text: str | None = None) -> None:
        super().__init__(kind, message, text)  # all, so that it can be sent between processes
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return str(self.args[1])


def shown(value: Any) -> str:
    """The beginning of a value on one line, for a message."""
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 80 else text[:80] + "…"


def first_value(mapping: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is not null: columns of a table are there in every row."""
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)


def first_filled(row: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is neither null nor empty, else the first that is not null: some tables have "" or [] in
    every column that a row does not use."""
    filled = (row[key] for key in keys if row.get(key) not in (None, "", []))
    return next(filled, first_value(row, *keys))
