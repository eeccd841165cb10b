"""Chat templates: Jinja files with generation markers, one table row each.

A template is stored in the checkpoint's tokenizer (`tokenizer.chat_template`); training, evaluation and chat render
that one, so there is no template flag anywhere else. Every template puts `{% generation %}` around exactly the
assistant's text and its end-of-turn token; `data.encoding` reads the labels off those marks.

Callers: `model.build` (a recipe's `chat_template`), `data.encoding`, `data.check`.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError, did_you_mean
from llava_compete.language.families import FAMILIES, LanguageFamily

log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


# Control tokens that a tokenizer must have for a template. Which model families use it is a matter of
# `language.families`.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "smollm": ("<|im_start|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": (),
    "vicuna_v1": (),
    "llava_llama_2": (),
    "plain": (),
}


@cache
def read_template(name: str) -> str:
    """The Jinja text of a template of the table."""
    if name not in TEMPLATES:
        hint = did_you_mean(name, TEMPLATES) or f"; valid: {', '.join(TEMPLATES)}"
        raise UserError(f"unknown chat template {name!r}{hint}")
    parts = [(_FOLDER / f"{part}.jinja").read_text(encoding="utf-8") for part in ("_content", name)]
    return "".join(parts).rstrip("\n")


def set_chat_template(tokenizer: Any, name: str) -> int:
    """Store template `name` in `tokenizer`; return how many control tokens were new to it.

    When that is not 0, the caller must resize the language model's embeddings.
    """
    text = read_template(name)
    known = tokenizer.get_vocab()
    missing = [token for token in TEMPLATES[name] if token not in known]
    added = tokenizer.add_tokens(missing, special_tokens=True) if missing else 0
    if "eos_token" in text and tokenizer.eos_token is None:
        raise UserError(f"chat template {name!r} ends turns with the eos token, and this tokenizer has none")
    tokenizer.chat_template = text
    return added


def ensure_generation_markers(tokenizer: Any, model_type: str) -> int:
    """Replace a chat template without generation markers by ours for the model's family, and say so.

    Returns the number of new control tokens, as `set_chat_template`. A template that has the markers is kept.
    """
    if tokenizer.chat_template and has_generation_markers(tokenizer.chat_template):
        return 0
    name = family_template(model_type, tokenizer)
    had = "has no generation markers" if tokenizer.chat_template else "is missing"
    log.warning("the tokenizer's chat template %s: using %r, ours for model type %r", had, name, model_type)
    return set_chat_template(tokenizer, name)


def has_generation_markers(template: str) -> bool:
    """Whether labels can be read off this Jinja text."""
    return _GENERATION.search(template) is not None


def family_template(model_type: str, tokenizer: Any) -> str:
    """Name of our template for a language model's `model_type`, told apart by the tokenizer's control tokens."""
    vocabulary = tokenizer.get_vocab()
    for name in FAMILIES.get(model_type, LanguageFamily()).templates:
        if all(token in vocabulary for token in TEMPLATES[name]):
            return name
    raise UserError(
        f"no chat template is known for model type {model_type!r}: set `chat_template` to one of {', '.join(TEMPLATES)}"
    )
