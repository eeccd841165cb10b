"""Tokenizers: a byte-level BPE trained on the run's own texts (the demo, tests), and the image placeholder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_compete.parts import IMAGE_TOKEN

PAD_TOKEN, END_TOKEN = "<pad>", "<eos>"


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, the special ones first; any text can be encoded with it.

    Has a pad and an end token; more come with a chat template (`language.templates.set_chat_template`).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN, IMAGE_TOKEN, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        extra_special_tokens=[IMAGE_TOKEN, *special_tokens],
        clean_up_tokenization_spaces=False,
    )


def add_image_token(tokenizer: Any) -> int:
    """Make sure that `tokenizer` has the placeholder and a pad token; return the placeholder's id."""
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
