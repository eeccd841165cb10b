"""Perplexity and bits per byte of a language model on its held-out text, beside bigram models of the same split.

A row's first token is not predicted. Bits per byte divides all bits of the predicted tokens by the bytes of text that
they stand for, so that models with other tokenizers can be compared. Caller: `llava-compete perplexity`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from llava_compete.data.bigram import Bigram
from llava_compete.data.text import HeldOutRows, TextCollator, encoder, token_byte_lengths
from llava_compete.data.text_config import TextSection
from llava_compete.data.text_sources import is_held_out, read_source, read_validation

_BYTE_END = 256


@dataclass(frozen=True)
class Perplexity:
    """On the same held-out rows: the model's loss in nats a token, and bits per byte of the model and of bigrams."""

    tokens: int
    text_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    token_bigram_bits_per_byte: float
    byte_bigram_bits_per_byte: float


def measure(model: Any, tokenizer: Any, section: TextSection, batch_size: int = 8) -> Perplexity:
    """Evaluate `model` (as loaded; its device is used) on the held-out text of `section`."""
    rows = HeldOutRows(section, tokenizer)
    collate = TextCollator(section.separate_documents)
    lengths = token_byte_lengths(tokenizer)
    nats = 0.0
    tokens = text_bytes = 0
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc="held-out rows", unit="batch"):
        batch = collate([rows[row] for row in range(start, min(start + batch_size, len(rows)))])
        del batch["sample_ids"]
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits[:, :-1].float().cpu()
        nats += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        predicted = labels[labels != -100]
        tokens += len(predicted)
        text_bytes += int(lengths[predicted].sum())
    return Perplexity(
        tokens,
        text_bytes,
        loss=nats / tokens,
        perplexity=math.exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / text_bytes,
        token_bigram_bits_per_byte=_token_bigram(rows, tokenizer, section, lengths),
        byte_bigram_bits_per_byte=_byte_bigram(section),
    )


def _train_texts(section: TextSection) -> Any:
    fraction = 0.0 if section.validation is not None else section.validation_fraction
    return (text for text in read_source(section.train) if not (fraction and is_held_out(text, fraction)))


def _token_bigram(rows: HeldOutRows, tokenizer: Any, section: TextSection, lengths: torch.Tensor) -> float:
    encode = encoder(tokenizer)
    bigram = Bigram((encode(text) for text in _train_texts(section)), len(tokenizer))
    tokens_RN = rows.tokens_RN.numpy()
    # Behind an end token a bigram knows nothing of the next document but how documents begin in general.
    nats = -bigram.log_probs(tokens_RN[:, :-1].ravel(), tokens_RN[:, 1:].ravel()).sum()
    return float(nats / math.log(2) / int(lengths[rows.tokens_RN[:, 1:]].sum()))


def _byte_bigram(section: TextSection) -> float:
    def encode(text: str) -> list[int]:
        return [*text.encode("utf-8", "surrogatepass"), _BYTE_END]

    bigram = Bigram((encode(text) for text in _train_texts(section)), _BYTE_END + 1)
    bits, count = 0.0, 0
    for text in read_validation(section):
        ids = np.array(encode(text), dtype=np.int64)
        bits -= float(bigram.log_probs(ids[:-1], ids[1:]).sum()) / math.log(2)
        count += len(ids) - 2  # without the end symbol, and the first byte is not predicted
    return bits / count
