"""One conversation to token ids and labels, in one pass.

The chat template is rendered once; its generation marks say which characters the model must learn. The text is cut
there before it is tokenised, so a training row begins with exactly the ids of the prompt at generation time.

- The string of a special token inside anybody's text stays text: it is marked before rendering and tokenised as plain
  characters.
- An image is a content part `{"type": "image"}`; the template writes one image token for it, which becomes
  `tokens_per_image` ids. A literal "<image>" in a text is text like any other.

Callers: `data.dataset`, `data.check`; anything that builds a prompt may call it with `add_generation_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from llava_compete.errors import UserError
from llava_compete.language.piece_ids import PieceEncoder, piece_encoder
from llava_compete.parts import IGNORE_INDEX

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


class EncodingError(UserError):
    """A conversation that the tokenizer's chat template cannot express."""


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
    Raises `EncodingError` if the template cannot render them or does not write each image once.
    """
    encoder = piece_encoder(tokenizer)
    text, spans = _render(tokenizer, encoder, messages, add_generation_prompt)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    input_ids: list[int] = []
    labels: list[int] = []
    turn_ends: list[TurnEnd] = []
    images = position = 0

    def add(start: int, end: int, learnt: bool) -> None:
        nonlocal images
        ids = encoder.encode(text[start:end], before=text[:start], answer=learnt)
        if not learnt and image_id in ids:
            images += ids.count(image_id)
            ids = [same for token in ids for same in ([token] * tokens_per_image if token == image_id else [token])]
        input_ids.extend(ids)
        labels.extend(ids if learnt else [IGNORE_INDEX] * len(ids))

    for start, end in spans:
        add(position, start, learnt=False)
        add(start, end, learnt=True)
        turn_ends.append(TurnEnd(len(input_ids), images))
        position = end
    add(position, len(text), learnt=False)
    expected = sum(part["type"] == "image" for message in messages for part in content_parts(message))
    if images != expected:
        raise EncodingError(f"the chat template writes {images} image tokens ({image_token}) for {expected} images")
    return EncodedConversation(input_ids, labels, turn_ends, images)


def content_parts(message: Message) -> Sequence[dict[str, Any]]:
    """The content of a message as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def cut_to_length(encoded: EncodedConversation, max_length: int) -> EncodedConversation | None:
    """Cut after the last answer that ends within `max_length` tokens; None if not even the first one does.

    Image spans lie before an answer's end, so none is ever cut.
    """
    fitting = [end for end in encoded.turn_ends if end.position <= max_length]
    if not fitting:
        return None
    if len(encoded.input_ids) <= max_length:
        return encoded
    position, images = fitting[-1]
    return EncodedConversation(encoded.input_ids[:position], encoded.labels[:position], fitting, images)


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end an answer: the template's end-of-turn token, and the tokenizer's eos."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = encode_conversation(tokenizer, messages)
    if not encoded.turn_ends:
        raise UserError("the chat template has no generation markers around the assistant's turn")
    last = encoded.input_ids[encoded.turn_ends[-1].position - 1]
    return sorted({last} | ({tokenizer.eos_token_id} - {None}))


def _render(
    tokenizer: Any, encoder: PieceEncoder, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and the characters of it that the model learns, as (start, end)."""
    marked = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            marked.append({**message, "content": encoder.mark(content)})
            continue
        parts = [
            {"type": "text", "text": encoder.mark(part["text"])} if part["type"] == "text" else {"type": "image"}
            for part in content
        ]
        marked.append({**message, "content": parts})
    # A missing bos or eos is an empty string, so that a template can just write it.
    special_tokens = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
    try:
        texts, spans = render_jinja_template(
            conversations=[marked],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateError as error:
        raise EncodingError(f"the chat template cannot render this conversation: {error}") from error
    return texts[0], spans[0]
