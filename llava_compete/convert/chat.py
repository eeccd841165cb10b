"""The chat template of an imported model: its own where one can train with it, else the one of its family.

A template of transformers' multimodal models takes contents as parts, `{"type": "image"}` and `{"type": "text"}`; ours
are texts with `<image>` in them. A few lines in front of it turn the one into the other, images first, as such
templates write them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.files import read_json
from llava_compete.language.chat_encoding import encode_conversation
from llava_compete.language.templates import family_template, keep_chat_template, set_chat_template
from llava_compete.parts import IMAGE_TOKEN

logger = logging.getLogger(__name__)

_PARTS = """\
{%- set kept = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set found = namespace(parts=[]) -%}
{%- for _ in range(message['content'].count('<image>')) -%}
{%- set found.parts = found.parts + [{'type': 'image'}] -%}
{%- endfor -%}
{%- set text = message['content'].replace('<image>\\n', '').replace('\\n<image>', '').replace('<image>', '') -%}
{%- set found.parts = found.parts + [{'type': 'text', 'text': text}] -%}
{%- set kept.messages = kept.messages + [{'role': message['role'], 'content': found.parts}] -%}
{%- else -%}
{%- set kept.messages = kept.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = kept.messages -%}
"""


def adopt_template(tokenizer: Any, directory: Path, model_type: str, chosen: str | None) -> str:
    """Put a chat template into `tokenizer`; returns in words which it is.

    chosen: the name of one of `language.templates`; default the source's own, if it ends an answer with a token.

    Raises:
        UserError: no template fits; or one that needs tokens which the model does not have.
    """
    own = _own_template(tokenizer, directory)
    if chosen is None and own is not None:
        for text in (own, _PARTS + own):
            keep_chat_template(tokenizer, text)
            if _ends_answers(tokenizer):
                return "the source's own"
    name = chosen or family_template(model_type, tokenizer)
    if chosen is None and own is not None:
        logger.warning(
            "the source's chat template ends an answer with no token of its own, so that a model could not learn to "
            "stop: using %r, that of its family; choose another with --chat-template",
            name,
        )
    if set_chat_template(tokenizer, name):
        raise UserError(f"--chat-template: {name!r} needs tokens that the model does not have")
    return name


def _own_template(tokenizer: Any, directory: Path) -> str | None:
    """The processor's, which may lie in a file of its own, or the tokenizer's."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (directory / name).is_file() and read_json(directory / name).get("chat_template"):
            return str(read_json(directory / name)["chat_template"])
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _ends_answers(tokenizer: Any) -> bool:
    """Whether the template can say a question with an image and an answer, and ends that with a control token."""
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\na"}]}]
    conversation.append({"role": "assistant", "content": [{"type": "text", "text": "b"}]})
    try:
        encoded = encode_conversation(tokenizer, conversation)
    except UserError:
        return False
    last = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.answers[-1].end - 1])
    return last in tokenizer.all_special_tokens or last in tokenizer.get_added_vocab()


def image_token_of(tokenizer: Any, expected_id: int, source: str) -> None:
    """Check that `<image>` is the placeholder that the source's config names."""
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found != expected_id:
        token = tokenizer.convert_ids_to_tokens(expected_id)
        raise UserError(
            f"{source}: image_token_index: found {expected_id} ({token!r}), expected the id of {IMAGE_TOKEN} ({found})"
        )
