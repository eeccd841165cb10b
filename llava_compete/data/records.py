"""Rows in LLaVA's or the `messages` format to conversations, or a named reason why not.

A `Conversation` is what the rest of the package reads: messages with a role and content parts, and the images that
the parts refer to in reading order. A placeholder is looked for in the text of users and systems only: a literal
"<image>" in an answer is text. Callers: `data.tables` (training) and `data.check` (the report).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_compete.errors import UserError
from llava_compete.parts import IMAGE_TOKEN

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# LLaVA's line break between a placeholder and the text belongs to the chat template, which writes its own.
_SPLIT = re.compile(rf"\n?({re.escape(IMAGE_TOKEN)})\n?")


class RecordError(UserError):
    """A row that cannot be used; `kind` is the checker's name for the problem.

    `text` is what stands in the file in place of a row that could not be read.
    """

    def __init__(self, kind: str, message: str, text: str | None = None) -> None:
        super().__init__(kind, message, text)  # all, so that it can be sent between processes
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return str(self.args[1])


class Conversation(NamedTuple):
    """Messages with content parts, and images (path or bytes of the file) in the order of the image parts."""

    id: str
    messages: list[dict[str, Any]]
    images: list[str | bytes]
    images_placed: bool = False  # no placeholder said where: they were put before the first question


def parse_row(row: Any, default_id: str) -> Conversation:
    """Turn one row into a conversation, or raise `RecordError` for the first thing that is wrong with it.

    `image` or `images` hold a path, an embedded file ({"bytes", "path"}), or a list of them. Turns are under
    `conversations` (from, value) or `messages` (role, content: a text, or parts of type text and image).
    """
    if not isinstance(row, Mapping):
        raise RecordError("not_a_mapping", f"found {type(row).__name__}, expected a mapping with `conversations`")
    row_id = row.get("id")
    images = _images(row)
    messages = _messages(row)
    _check_order(messages)
    conversation = _place_images(default_id if row_id in (None, "") else str(row_id), messages, images)
    _check_unicode(conversation)
    return conversation


def _images(row: Mapping[str, Any]) -> list[str | bytes]:
    found = _first(row, "image", "images")
    if found is None or found == "":
        return []
    return [_image(item) for item in (found if isinstance(found, list | tuple) else [found])]


def _image(item: Any) -> str | bytes:
    if isinstance(item, Mapping) and isinstance(item.get("bytes"), bytes):
        return item["bytes"]
    path = item.get("path") if isinstance(item, Mapping) else item
    if isinstance(path, bytes) or (isinstance(path, str) and path.strip()):
        return path
    raise RecordError("image_reference_invalid", f"image: found {_short(item)}, expected a path or embedded bytes")


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = _first(row, "conversations", "messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError("no_conversation", f"no turns under `conversations` or `messages`, found {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RecordError("turn_not_a_mapping", f"turn {number}: found {type(turn).__name__}")
        role = _first(turn, "from", "role")
        if not isinstance(role, str) or role not in ROLES:
            raise RecordError("unknown_role", f"turn {number}: found role {_short(role)}, expected {', '.join(ROLES)}")
        content = _first(turn, "value", "content")
        messages.append({"role": ROLES[role], "content": _parts(ROLES[role], content, number)})
    return messages


def _parts(role: str, content: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if role == "assistant" else _split_placeholders(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RecordError("text_missing", f"turn {number}: found {_short(content)}, expected a text")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            if role == "assistant":
                raise RecordError("image_in_answer", f"turn {number}: an answer cannot hold an image")
            inline = _first(part, "image", "path")
            parts.append({"type": "image"} if inline is None else {"type": "image", "image": _image(inline)})
        else:
            raise RecordError("content_part_invalid", f"turn {number}: found {_short(part)}, expected text or image")
    return parts


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(_SPLIT.split(text)):
        if index % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _check_order(messages: list[dict[str, Any]]) -> None:
    """An optional system turn, then user and assistant in turns, ending with an answer; nothing empty."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RecordError("system_not_first", f"a system turn is number {roles.index('system', 1) + 1}, expected first")
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[0] != "user":
        raise RecordError("no_question", "the first turn is not a question")
    for number, (role, expected) in enumerate(zip(spoken, ["user", "assistant"] * len(spoken), strict=False), start=1):
        if role != expected:
            raise RecordError("turns_out_of_order", f"turn {number} is of {role}, expected {expected}")
    if spoken[-1] == "user":
        raise RecordError("last_question_unanswered", "the last turn is a question without an answer")
    for number, message in enumerate(messages, start=1):
        text = "".join(part.get("text", "") for part in message["content"])
        if message["role"] == "assistant" and not text.strip():
            raise RecordError("empty_answer", f"turn {number}: the answer is empty")
        has_image = any(part["type"] == "image" for part in message["content"])
        if message["role"] == "user" and not text.strip() and not has_image and number > 1:
            raise RecordError("empty_question", f"turn {number}: the question is empty")


def _place_images(row_id: str, messages: list[dict[str, Any]], images: list[str | bytes]) -> Conversation:
    """Images in reading order; a row with images and no placeholder gets them before its first question."""
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    inline = [part.pop("image") for part in places if "image" in part]
    if inline:
        if images or len(inline) != len(places):
            raise RecordError("placeholders_do_not_match", "some images are inside the content parts and some are not")
        return Conversation(row_id, messages, inline)
    if images and not places:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
        return Conversation(row_id, messages, images, images_placed=True)
    if len(places) != len(images):
        kind = "placeholder_without_image" if not images else "placeholders_do_not_match"
        raise RecordError(kind, f"{len(places)} placeholders {IMAGE_TOKEN} for {len(images)} images")
    return Conversation(row_id, messages, images)


def _check_unicode(conversation: Conversation) -> None:
    """Half a surrogate pair (an escape such as \\ud83d alone, or a byte of the file that is not UTF-8) is no text."""
    texts = [part.get("text", "") for message in conversation.messages for part in message["content"]]
    for text in (conversation.id, *(image for image in conversation.images if isinstance(image, str)), *texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            raise RecordError("not_unicode", f"found {around!r}, which is not Unicode text") from error


def _first(mapping: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is not null: columns of a table are there in every row."""
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)


def _short(value: Any) -> str:
    """The beginning of a value on one line, for a message."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:80] + "…"
