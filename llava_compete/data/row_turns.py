"""The turns of a row to messages with content parts, in every spelling that data sets use.

LLaVA's and ShareGPT's `conversations` (from, value), the `messages` of chat templates and of OpenAI (role, content: a
text, or parts of type text, image and image_url), and The Cauldron's `texts` (user, assistant). A placeholder is
looked for in the text of users and systems only: a literal "<image>" in an answer is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_compete.data.row_errors import RecordError, first_filled, shown
from llava_compete.data.row_images import image_part
from llava_compete.data.strict_json import DECODER, UNDECODABLE, KeyTwiceError
from llava_compete.language.chat_encoding import on_lines_of_their_own
from llava_compete.parts import IMAGE_TOKEN

TURNS = ("conversations", "messages", "texts")
SYSTEM = ("system", "system_prompt")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TURN_KEYS = {"from", "role", "value", "content", "loss", "weight", "reasoning_content"}
_SPLIT = re.compile(f"({re.escape(IMAGE_TOKEN)})")  # and no white space around it: the text stays as it is in the file


def row_messages(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages (role, content parts; `supervised: False` and `reasoning_content` where the row says so), ignored keys.

    Raises:
        RecordError: the first turn that cannot be read.
    """
    ignored: dict[str, None] = {}
    messages = [_message(turn, number, ignored) for number, turn in enumerate(_turns(row, ignored), start=1)]
    text = first_filled(row, *SYSTEM)
    if text not in (None, ""):
        if not isinstance(text, str):
            raise RecordError("text_missing", f"system: found {shown(text)}, expected a text")
        system = {"role": "system", "content": _split_placeholders(text)}
        if messages[0]["role"] != "system":
            messages.insert(0, system)
        elif messages[0]["content"] != system["content"]:
            raise RecordError("system_twice", "a system text of the row and another one among its turns")
    return messages, list(ignored)


def _turns(row: Mapping[str, Any], ignored: dict[str, None]) -> Sequence[Any]:
    turns = first_filled(row, *TURNS)
    in_pairs = turns is row.get("texts")
    if isinstance(turns, str):  # a column of a table that holds JSON
        try:
            turns = DECODER.decode(turns)
        except KeyTwiceError as error:
            raise RecordError("key_twice", f"turns: {error}") from None
        except UNDECODABLE:
            raise RecordError("no_conversation", f"no turns, found the text {shown(turns)}") from None
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise RecordError("no_conversation", f"no turns under {', '.join(TURNS)}, found {shown(turns)}")
    if in_pairs:
        return [turn for pair in turns for turn in _cauldron_pair(pair, ignored)]
    return turns


def _cauldron_pair(pair: Any, ignored: dict[str, None]) -> list[Any]:
    if not isinstance(pair, Mapping):
        return [pair]
    for key in pair:
        if key not in ("user", "assistant") and pair[key] is not None:
            ignored[f"texts.{key}"] = None
    return [{"role": role, "content": pair.get(role)} for role in ("user", "assistant")]


def _message(turn: Any, number: int, ignored: dict[str, None]) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RecordError("turn_not_a_mapping", f"turn {number}: found {type(turn).__name__}")
    name = first_filled(turn, "from", "role")
    if not isinstance(name, str) or name not in ROLES:
        raise RecordError("unknown_role", f"turn {number}: found role {shown(name)}, expected {', '.join(ROLES)}")
    role = ROLES[name]
    message: dict[str, Any] = {"role": role, "content": _parts(role, first_filled(turn, "value", "content"), number)}
    for key, value in turn.items():
        second = {"role": "from", "content": "value"}.get(key)
        beside = second is not None and turn.get(second) not in (None, "", value)
        if value is not None and value != [] and (key not in _TURN_KEYS or beside):
            ignored[f"turn.{key}"] = None
    if role == "assistant":
        if not _is_learnt(turn, number):
            message["supervised"] = False
        reasoning = turn.get("reasoning_content")
        if reasoning not in (None, ""):
            if not isinstance(reasoning, str):
                raise RecordError("text_missing", f"turn {number}: reasoning_content: found {shown(reasoning)}")
            message["reasoning_content"] = reasoning
    else:
        asked = {f"turn.{key}" for key in ("loss", "weight", "reasoning_content") if turn.get(key)}
        ignored.update(dict.fromkeys(sorted(asked)))
    return message


def _is_learnt(turn: Mapping[str, Any], number: int) -> bool:
    """`loss: false` or `weight: 0`: an answer that is context for the others and no target."""
    for key in ("loss", "weight"):
        value = turn.get(key)
        if value is not None and value not in (0, 1):  # True and False are 1 and 0
            raise RecordError(
                "turn_weight_unsupported", f"turn {number}: {key}: found {shown(value)}, expected 0, 1, true or false"
            )
    return all(turn.get(key) is None or bool(turn[key]) for key in ("loss", "weight"))


def _parts(role: str, content: Any, number: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if role == "assistant" else _split_placeholders(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RecordError("text_missing", f"turn {number}: found {shown(content)}, expected a text")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            if role == "assistant":
                raise RecordError("image_in_answer", f"turn {number}: an answer cannot hold an image")
            parts.append(image_part(part))
        else:
            raise RecordError("content_part_invalid", f"turn {number}: found {shown(part)}, expected text or image")
    return on_lines_of_their_own(parts)


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    pieces = _SPLIT.split(text)
    parts = [{"type": "image"} if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)]
    return [part for part in parts if part["type"] == "image" or part["text"]]
