"""Chat templates: Jinja files with generation marks, one table row each, for tokenizers that bring none.

A template is stored in the checkpoint's tokenizer (`tokenizer.chat_template`); training, evaluation and chat render
that one, so there is no template flag anywhere else. A tokenizer's own template is kept as it is, whatever the model's
family, but for today's date: `language.chat_rendering` finds the answers in any.

Sources: chatml, qwen2_5, qwen3, smollm2, smollm3, gemma, llama3, phi3: the templates that the models' authors publish;
vicuna_v1, llava_llama_2, plain: LLaVA's conversations; mistral_*: mistral-common, versions 1, 3 and 3 with tekken.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llava_compete.errors import UserError, did_you_mean
from llava_compete.language.chat_encoding import refuse_other_prompts, stop_token_ids
from llava_compete.language.chat_rendering import DAY, with_fixed_day
from llava_compete.language.families import FAMILIES, LanguageFamily

log = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent

_THOUGHT = ("<think>", "</think>")
# Control tokens that a tokenizer must have for a template. Which model families use it is a matter of
# `language.families`.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", *_THOUGHT),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "smollm3": ("<|im_start|>", "<|im_end|>", *_THOUGHT),
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral_tekken": ("[INST]", "[/INST]", "<SPECIAL_20>"),  # the last: version 3 has `[control_20]` in its place
    "mistral_v3": ("[INST]", "[/INST]"),
    "mistral_v1": (),
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
    return with_fixed_day("".join(parts).rstrip("\n"))


def set_chat_template(tokenizer: Any, name: str) -> int:
    """Store template `name` in `tokenizer`; return how many control tokens were new to it.

    When that is not 0, the caller must resize the language model's embeddings.
    """
    text = read_template(name)
    known = tokenizer.get_vocab()
    missing = [token for token in TEMPLATES[name] if token not in known]
    # A thought is text of an answer: its marks are tokens, but not special ones, which decoding would leave out.
    thought = [AddedToken(token, special=False, normalized=False) for token in missing if token in _THOUGHT]
    special = [token for token in missing if token not in _THOUGHT]
    added = sum(tokenizer.add_tokens(tokens, special_tokens=tokens is special) for tokens in (special, thought))
    if "eos_token" in text and tokenizer.eos_token is None:
        raise UserError(f"chat template {name!r} ends turns with the eos token, and this tokenizer has none")
    tokenizer.chat_template = text
    return added


def keep_chat_template(tokenizer: Any, text: str) -> None:
    """Store a template that is not ours, as it is but for today's date."""
    tokenizer.chat_template = with_fixed_day(text)
    if tokenizer.chat_template != text:
        log.info("the chat template writes today's date: it is always %s here, in training and after", DAY)


def choose_chat_template(tokenizer: Any, model_type: str) -> int:
    """Keep the tokenizer's own chat template, or store the one of the model's family and say so.

    Returns the number of new control tokens, as `set_chat_template`.
    """
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.chat_template:
        keep_chat_template(tokenizer, tokenizer.chat_template)
        try:
            stop_token_ids(tokenizer)
            refuse_other_prompts(tokenizer)
        except UserError as error:
            raise UserError(
                f"the tokenizer's own chat template cannot be trained with: {error}; "
                f"set `chat_template` to one of {', '.join(TEMPLATES)}"
            ) from error
        return 0
    name = family_template(model_type, tokenizer)
    log.warning("the tokenizer has no chat template: using %r, ours for model type %r", name, model_type)
    return set_chat_template(tokenizer, name)


def family_template(model_type: str, tokenizer: Any) -> str:
    """Name of our template for a language model's `model_type`, told apart by the tokenizer's control tokens."""
    vocabulary = tokenizer.get_vocab()
    for name in FAMILIES.get(model_type, LanguageFamily()).templates:
        if all(token in vocabulary for token in TEMPLATES[name]):
            return name
    raise UserError(
        f"no chat template is known for model type {model_type!r}: set `chat_template` to one of {', '.join(TEMPLATES)}"
    )
