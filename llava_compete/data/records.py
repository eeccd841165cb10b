"""Rows in any of the common formats to conversations, or a named reason why not.

A `Conversation` is what the rest of the package reads: messages with a role and content parts, and the images that
the parts refer to in reading order. Nothing of a row is dropped in silence: what cannot be honoured and changes the
row's meaning is an error, the rest is named in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_compete.data.page_words import KEY as PAGE_WORDS
from llava_compete.data.page_words import Word, row_words
from llava_compete.data.row_errors import RecordError, first_filled
from llava_compete.data.row_images import in_reading_order, row_images
from llava_compete.data.row_turns import SYSTEM, TURNS, row_messages

# Without these a row means something else: it is refused where it has one.
_REFUSED = ("video", "videos", "audio", "audios", "objects", "bbox", "bboxes")
_READ = {"id", "image", "images", PAGE_WORDS, *TURNS, *SYSTEM}


class Conversation(NamedTuple):
    """Messages with content parts, and images (path or bytes of the file) in the order of the image parts.

    A message may have `supervised: False`, an answer that is not learnt, and `reasoning_content` for the template.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[str | bytes]
    words: list[Word]  # of its only image
    notes: list[tuple[str, str]]  # the checker's warnings: kind, message


def parse_row(row: Any, default_id: str) -> Conversation:
    """Turn one row into a conversation, or raise `RecordError` for the first thing that is wrong with it.

    `image` or `images` hold a path, an embedded file, a data URL, or a list of them; turns are under `conversations`,
    `messages` or `texts`, a system text also under `system` or `system_prompt`, the words of a page under `page_words`.
    """
    if not isinstance(row, Mapping):
        raise RecordError("not_a_mapping", f"found {type(row).__name__}, expected a mapping with `conversations`")
    for key in _REFUSED:
        if row.get(key):
            raise RecordError("field_unsupported", f"{key}: this package trains on images and text only")
    notes: list[tuple[str, str]] = []
    images = row_images(row)
    messages, ignored = row_messages(row)
    ignored += [key for key in row if isinstance(key, str) and _is_ignored(row, key)]
    images, placed = in_reading_order(messages, images)
    if placed:
        notes.append(("image_without_placeholder", "images but no placeholder: put before the first question"))
    images = _trim(messages, images, notes)
    notes += [("field_ignored", key) for key in ignored]
    _check_order(messages)
    if any(not message.get("supervised", True) for message in messages):
        notes.append(("answer_not_learnt", "an answer with loss: false or weight: 0, context for the others"))
    row_id = row.get("id")
    words = row_words(row, len(images))
    conversation = Conversation(default_id if row_id in (None, "") else str(row_id), messages, images, words, notes)
    _check_unicode(conversation)
    return conversation


def _is_ignored(row: Mapping[str, Any], key: str) -> bool:
    """Whether a key has a value that nothing reads: unknown, or a second spelling of what was read already."""
    if row[key] is None or row[key] == "" or row[key] == []:
        return False
    if key not in _READ:
        return key not in _REFUSED
    for spellings in (("image", "images"), TURNS, SYSTEM):
        if key in spellings:
            return row[key] is not first_filled(row, *spellings)
    return False


def _trim(messages: list[dict[str, Any]], images: list[str | bytes], notes: list[tuple[str, str]]) -> list[str | bytes]:
    """Leave out an answer before the first question, as LLaVA does, and a last question without an answer.

    From neither is anything learnt. Returns the images that are left.
    """
    start = int(messages[0]["role"] == "system")
    if len(messages) > start + 1 and messages[start]["role"] == "assistant":
        del messages[start]
        notes.append(("first_answer_dropped", "the conversation begins with an answer: left out, as LLaVA does"))
    if len(messages) > start + 1 and messages[-1]["role"] == "user":
        dropped = sum(part["type"] == "image" for part in messages.pop()["content"])
        notes.append(("last_question_dropped", "the last turn is a question without an answer: left out"))
        return images[: len(images) - dropped]
    return images


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
        raise RecordError("last_question_unanswered", "the only question has no answer")
    for number, message in enumerate(messages, start=1):
        text = "".join(part.get("text", "") for part in message["content"])
        if message["role"] == "assistant" and not text.strip():
            raise RecordError("empty_answer", f"turn {number}: the answer is empty")
        has_image = any(part["type"] == "image" for part in message["content"])
        if message["role"] == "user" and not text.strip() and not has_image and number > 1:
            raise RecordError("empty_question", f"turn {number}: the question is empty")
    if not any(message["role"] == "assistant" and message.get("supervised", True) for message in messages):
        raise RecordError("nothing_to_learn", "loss: false or weight: 0 on every answer")


def _check_unicode(conversation: Conversation) -> None:
    """Half a surrogate pair (an escape such as \\ud83d alone, or a byte of the file that is not UTF-8) is no text."""
    paths = [image for image in conversation.images if isinstance(image, str)]
    words = [word.text for word in conversation.words]
    for text in (conversation.id, *paths, *words, *message_texts(conversation.messages)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            raise RecordError("not_unicode", f"found {around!r}, which is not Unicode text") from error


def message_texts(messages: list[dict[str, Any]]) -> list[str]:
    """Every text of a conversation: its text parts and its reasoning."""
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    return texts + [message["reasoning_content"] for message in messages if "reasoning_content" in message]
