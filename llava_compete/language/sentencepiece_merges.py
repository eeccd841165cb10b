"""The merges of a tokenizer that comes as a SentencePiece model alone, such as Vicuna's.

transformers (5.17 to 5.23) makes byte-pair merges of such a file in the order of its ids. SentencePiece merges the pair
with the highest score first, and the two differ for runs of spaces: Llama's and Mistral's have the first free ids and
the lowest scores, so that "a  b" became `▁a ▁▁ b` in place of `▁a ▁ ▁b`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers.tokenization_utils_base import generate_merges


def order_merges_by_score(tokenizer: Any) -> None:
    """Mend `tokenizer` in place, if it is byte-pair encoding made from a `.model` file."""
    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if file.suffix != ".model" or not file.is_file() or file.with_name("tokenizer.json").is_file():
        return
    if backend is None or not isinstance(backend.model, BPE):
        return
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.IdToPiece(number): number for number in range(pieces.GetPieceSize())}
    scores = {piece: pieces.GetScore(number) for piece, number in vocabulary.items()}
    model = backend.model
    backend.model = BPE(
        vocabulary,
        generate_merges(vocabulary, scores),
        unk_token=model.unk_token,
        fuse_unk=model.fuse_unk,
        byte_fallback=model.byte_fallback,
    )
