"""Perplexity and bits per byte of a language model on its held-out text, beside bigram models of the same split.

A row's first token is not predicted. Bits per byte divides all bits of the predicted tokens by the bytes of text that
they stand for, so that models with other tokenizers can be compared. The bigrams count the training text from its
beginning, up to 20 million symbols: text from the hub has no end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from llava_compete.data.text.batches import TextCollator
from llava_compete.data.text.bigram import Bigram
from llava_compete.data.text.config import TextSection
from llava_compete.data.text.rows import HeldOutRows, encoder, token_byte_lengths
from llava_compete.data.text.sources import is_held_out, read_source
from llava_compete.evaluation.unit_scores import Unit

_BYTE_END = 256
_BIGRAM_SYMBOLS = 20_000_000


@dataclass(frozen=True)
class Perplexity:
    """Loss in nats a token, and bits per byte of the model and of bigrams, all on the same held-out text."""

    tokens: int
    text_bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    token_bigram_bits_per_byte: float
    byte_bigram_bits_per_byte: float


class RowScore(NamedTuple):
    """One held-out row: bits the model needs, bytes of its predicted tokens, how many it predicts right, and a digest
    of those tokens, by which two evaluations are known to have seen the same text."""

    bits: float
    text_bytes: int
    correct: int
    tokens: int
    content: str


def measure(model: Any, tokenizer: Any, section: TextSection, batch_size: int = 8) -> tuple[Perplexity, list[RowScore]]:
    """Evaluate `model` (as loaded; its device is used) on the held-out text of `section`, in all and by row."""
    rows = HeldOutRows(section, tokenizer)
    collate = TextCollator(section.separate_documents)
    lengths = token_byte_lengths(tokenizer)
    scores: list[RowScore] = []
    model.eval()
    for start in tqdm(range(0, len(rows), batch_size), desc="held-out rows", unit="batch"):
        batch = collate([rows[row] for row in range(start, min(start + batch_size, len(rows)))])
        del batch["sample_ids"]
        labels_BN = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
            output = model(**{key: value.to(model.device) for key, value in tensors.items()})
        logits_BNV = output.logits[:, :-1].float().cpu()
        bits_BN = F.cross_entropy(logits_BNV.transpose(1, 2), labels_BN, reduction="none") / math.log(2)
        right_BN = logits_BNV.argmax(-1) == labels_BN
        for bits_N, right_N, labels_N in zip(bits_BN, right_BN, labels_BN, strict=True):
            kept = labels_N != -100
            size = int(lengths[labels_N[kept]].sum())
            content = hashlib.sha256(labels_N[kept].numpy().tobytes()).hexdigest()[:16]
            scores.append(RowScore(float(bits_N.sum()), size, int(right_N[kept].sum()), int(kept.sum()), content))
    tokens, text_bytes = sum(row.tokens for row in scores), sum(row.text_bytes for row in scores)
    bits = sum(row.bits for row in scores)
    loss = bits * math.log(2) / tokens
    found = Perplexity(
        tokens,
        text_bytes,
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=bits / text_bytes,
        token_bigram_bits_per_byte=_token_bigram(rows, tokenizer, section, lengths),
        byte_bigram_bits_per_byte=_byte_bigram(rows.texts, section),
    )
    return found, scores


def comparison_units(scores: list[RowScore]) -> dict[str, list[Unit]]:
    """Rows as units of `llava-compete compare`: tasks `text_compression` and `text_next_token`.

    Compression is the share of the text's bits (8 a byte) that the model saves: higher is better, and 1 percent is
    0.08 bits per byte.
    """
    compression = [
        Unit(str(n), 1 - row.bits / (8 * row.text_bytes), row.text_bytes, None, "", row.content)
        for n, row in enumerate(scores)
    ]
    accuracy = [
        Unit(str(n), row.correct / row.tokens, row.tokens, None, "", row.content) for n, row in enumerate(scores)
    ]
    return {"text_compression": compression, "text_next_token": accuracy}


def _counted(section: TextSection, encode: Callable[[str], Sequence[int]]) -> Iterator[Sequence[int]]:
    """Training documents as symbols, the beginning of them."""
    fraction = 0.0 if section.validation is not None else section.validation_fraction
    left = _BIGRAM_SYMBOLS
    for text in read_source(section.train):
        if not (fraction and is_held_out(text, fraction)):
            symbols = encode(text)
            yield symbols
            left -= len(symbols)
        if left <= 0:
            return


def _token_bigram(rows: HeldOutRows, tokenizer: Any, section: TextSection, lengths: torch.Tensor) -> float:
    bigram = Bigram(_counted(section, encoder(tokenizer)), len(tokenizer))
    before, after = rows.tokens_RN[:, :-1], rows.tokens_RN[:, 1:]
    if section.separate_documents:  # then a document's first token is not predicted, as in training
        within = rows.documents_RN[:, :-1] == rows.documents_RN[:, 1:]
        before, after = before[within], after[within]
    # Behind an end token a bigram knows nothing of the next document but how documents begin in general.
    nats = -bigram.log_probs(before.numpy().ravel(), after.numpy().ravel()).sum()
    return float(nats / math.log(2) / int(lengths[after].sum()))


def _byte_bigram(texts: list[str], section: TextSection) -> float:
    def encode(text: str) -> list[int]:
        return [*text.encode(), _BYTE_END]

    bigram = Bigram(_counted(section, encode), _BYTE_END + 1)
    bits, count = 0.0, 0
    for text in texts:
        ids = np.array(encode(text), dtype=np.int64)
        bits -= float(bigram.log_probs(ids[:-1], ids[1:]).sum()) / math.log(2)
        count += max(len(ids) - 2, 0)  # without the end symbol, and the first byte is not predicted
    return bits / count
