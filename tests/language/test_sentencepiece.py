"""A tokenizer that is a SentencePiece model and nothing else, as Vicuna's: it loads, with SentencePiece's own ids."""

import io

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as format_of_models
from transformers import AutoTokenizer

from llava_compete.language.config import LanguageModelSection
from llava_compete.language.sentencepiece_merges import order_merges_by_score
from llava_compete.language.sources import load_tokenizer

TEXTS = ["the red circle and the blue square", "what colour is the circle ?", "a red square is above the circle"] * 20


@pytest.fixture
def folder(tmp_path):
    """Byte-pair encoding with runs of spaces as Llama 2 has them: the first ids, and the lowest scores."""
    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=buffer, model_type="bpe", vocab_size=320, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    model = format_of_models.ModelProto.FromString(buffer.getvalue())
    kept = list(model.pieces)
    first = next(index for index, piece in enumerate(kept) if piece.type == 1)
    del model.pieces[:]
    runs = [type(kept[0])(piece="▁" * length, score=-1e9, type=1) for length in (2, 4)]
    model.pieces.extend([*kept[:first], *runs, *kept[first:]])
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    return tmp_path


@pytest.mark.parametrize("text", ["the red circle", "the  red   circle", "what is    above ?", "é the\n\tred"])
def test_the_ids_are_sentencepieces_own(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    order_merges_by_score(tokenizer)
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # Only the space before a text's first word is not a matter of merges.
    expected = reference.encode("." + text)[1:]
    assert tokenizer.encode("▁." + text, add_special_tokens=False)[-len(expected) :] == expected


def test_a_stage_loads_it(folder):
    class Config:
        model_type = "llama"

    tokenizer = load_tokenizer(LanguageModelSection(name=str(folder)), None, Config())
    assert "USER: " in tokenizer.chat_template  # Vicuna's: the family without control tokens
    assert tokenizer.tokenize("the  red")[-2:] == ["▁", "▁red"]
    assert "<image>" in tokenizer.get_vocab()
