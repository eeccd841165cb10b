"""One conversation to token ids and labels, in one pass.

The chat template is rendered once; its generation marks say which characters the model must learn. Ids of a training
row begin with exactly the ids of the prompt at generation time, because text is always cut where an answer begins.

- Special tokens inside anybody's text stay text: they are marked before rendering and tokenised as plain characters.
- An image is a content part `{"type": "image"}`; the template writes one image token for it, which becomes
  `tokens_per_image` ids. A literal "<image>" in a text is text like any other.

Callers: `data.dataset`, `data.check`, and `LlavaCompeteProcessor` for prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from llava_compete.errors import UserError

IGNORE_INDEX = -100
# Private-use characters around a special token's string in a text; they are dropped from texts beforehand.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
_ANCHOR = "\n"

Message = dict[str, Any]


class TurnEnd(NamedTuple):
    """A place where a conversation may be cut: after the end token of an answer."""

    position: int  # tokens before the cut
    num_images: int  # images before the cut


class EncodedConversation(NamedTuple):
    """Token ids with images expanded, labels of the same length (-100 outside answers), and where it may be cut."""

    input_ids: list[int]
    labels: list[int]
    turn_ends: list[TurnEnd]
    num_images: int


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tokens_per_image: int = 0,
    image_token: str = "<image>",
    add_generation_prompt: bool = False,
) -> EncodedConversation:
    """Render `messages` with the tokenizer's template and tokenise once; see the module's docstring.

    `messages` have a role and a content: a string, or parts `{"type": "text", "text"}` and `{"type": "image"}`.
    Raises `UserError` if the template cannot render them or does not write each image once.
    """
    text, spans = _render(tokenizer, messages, add_generation_prompt)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    input_ids: list[int] = []
    labels: list[int] = []
    turn_ends: list[TurnEnd] = []
    images = 0
    for piece, supervised in _pieces(text, spans, _glues_spaces(tokenizer)):
        ids: list[int] = []
        for token in _encode_marked(tokenizer, piece, first=not input_ids):
            if token == image_id and not supervised:
                images += 1
                ids.extend([token] * tokens_per_image)
            else:
                ids.append(token)
        input_ids += ids
        labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        if supervised:
            turn_ends.append(TurnEnd(len(input_ids), images))
    expected = sum(part["type"] == "image" for message in messages for part in content_parts(message))
    if images != expected:
        raise UserError(f"the chat template writes {images} image tokens for {expected} images")
    return EncodedConversation(input_ids, labels, turn_ends, images)


def content_parts(message: Message) -> Sequence[dict[str, Any]]:
    """The content of a message as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the template's end-of-turn token, and the tokenizer's eos."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = encode_conversation(tokenizer, messages)
    if not encoded.turn_ends:
        raise UserError("the chat template has no generation markers around the assistant's turn")
    ids = {encoded.input_ids[encoded.turn_ends[-1].position - 1]}
    return sorted(ids | ({tokenizer.eos_token_id} - {None}))


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
    special = _special_pattern(tuple(tokenizer.added_tokens_encoder))
    marked = [{**message, "content": _mark(message["content"], special)} for message in messages]
    special_tokens = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
    try:
        texts, spans = render_jinja_template(
            conversations=[marked],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # a template may raise anything; what it says is for the user
        raise UserError(f"the chat template cannot render this conversation: {error}") from error
    return texts[0], spans[0]


def _mark(content: Any, special: re.Pattern[str]) -> Any:
    if isinstance(content, str):
        plain = content.replace(_OPEN, "").replace(_CLOSE, "")
        return special.sub(f"{_OPEN}\\g<0>{_CLOSE}", plain)
    return [
        {**part, "text": _mark(part["text"], special)} if part["type"] == "text" else {"type": part["type"]}
        for part in content
    ]


@lru_cache
def _special_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if not token.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _pieces(text: str, spans: list[tuple[int, int]], glue_spaces: bool) -> Iterator[tuple[str, bool]]:
    """Cut the rendered text at both ends of each answer: (piece, whether it is learnt), empty ones left out."""
    position = 0
    carried = ""  # a space that SentencePiece spells as part of the next word
    for start, end in spans:
        before, carried = text[position:start], ""
        if glue_spaces and before.endswith(" "):
            before, carried = before[:-1], " "
        if before:
            yield before, False
        yield carried + text[start:end], True
        position = end
    rest = text[position:]
    if glue_spaces and not rest.endswith("\n") and rest.endswith(" "):
        rest = rest[:-1]
    if rest:
        yield rest, False


def _encode_marked(tokenizer: Any, piece: str, first: bool) -> Iterator[int]:
    """Ids of one piece; strings between the marks are encoded as plain text."""
    for index, part in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", piece)):
        if not part:
            continue
        if index % 2:
            yield from _encode_plain(tokenizer, part)
        else:
            yield from _encode_after_anchor(tokenizer, part) if not (first and index == 0) else _encode(tokenizer, part)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _encode_after_anchor(tokenizer: Any, text: str) -> list[int]:
    """Encode text from the middle of a sequence: SentencePiece would put a space before it."""
    if not _glues_spaces(tokenizer):
        return _encode(tokenizer, text)
    anchor = _encode(tokenizer, _ANCHOR)
    ids = _encode(tokenizer, _ANCHOR + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else _encode(tokenizer, text)


def _encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Encode the string of a special token as ordinary characters."""
    # Cut after the first character, no added token can match; a special token inside the rest still could.
    ids = _encode_after_anchor(tokenizer, text[0])
    if len(text) > 1:
        ids = (
            ids + _encode_plain(tokenizer, text[1:])
            if _has_special(tokenizer, text[1:])
            else ids + (_encode_after_anchor(tokenizer, text[1:]))
        )
    return ids


def _has_special(tokenizer: Any, text: str) -> bool:
    return _special_pattern(tuple(tokenizer.added_tokens_encoder)).search(text) is not None


def _glues_spaces(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a space before a text (SentencePiece style), found out once."""
    cached = tokenizer.__dict__.get("_llava_compete_glues_spaces")
    if cached is None:
        with_anchor = _encode(tokenizer, _ANCHOR + "a")
        cached = with_anchor[len(_encode(tokenizer, _ANCHOR)) :] != _encode(tokenizer, "a")
        tokenizer.__dict__["_llava_compete_glues_spaces"] = cached
    return cached
