"""LLaVA JSON rows to conversations.

A `Conversation` is what the rest of the package reads: messages with a role and content parts, and the images that
the parts refer to in reading order. Placeholders are looked for in the user's and system's text only: a literal
"<image>" in an answer is text. Callers: `data.tables`, `data.check`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from llava_compete.errors import UserError

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA's newline between a placeholder and the text belongs to the template, which writes its own.
_SPLIT = re.compile(rf"\n?({re.escape(PLACEHOLDER)})\n?")


class RecordError(UserError):
    """A row that cannot be used; `kind` is the checker's name for the problem."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Conversation(NamedTuple):
    """Messages with content parts, and images (paths or bytes) in the order of the image parts."""

    id: str
    messages: list[dict[str, Any]]
    images: list[Any]


def parse_row(row: Any, default_id: str) -> Conversation:
    """Turn one LLaVA row into a conversation, or raise `RecordError`."""
    if not isinstance(row, dict):
        raise RecordError("not_a_mapping", f"row {default_id}: found {type(row).__name__}, expected a mapping")
    row_id = str(row.get("id", default_id))
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError("no_conversation", f"row {row_id}: no turns under `conversations`")
    image = row.get("image")
    images = [] if image in (None, "", []) else list(image) if isinstance(image, list) else [image]
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role = _ROLES.get(turn.get("from"))
        if role is None:
            raise RecordError("unknown_role", f"row {row_id}: found role {turn.get('from')!r}")
        text = turn.get("value")
        if not isinstance(text, str):
            raise RecordError("text_missing", f"row {row_id}: a turn of {role} has no text")
        messages.append({"role": role, "content": _parts(role, text)})
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and placeholders == 0:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
        placeholders = len(images)
    if placeholders != len(images):
        raise RecordError(
            "placeholders_do_not_match", f"row {row_id}: {placeholders} placeholders for {len(images)} images"
        )
    return Conversation(row_id, messages, images)


def _parts(role: str, text: str) -> list[dict[str, Any]]:
    if role == "assistant":
        return [{"type": "text", "text": text}]
    pieces = _SPLIT.split(text)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
