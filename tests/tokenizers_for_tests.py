"""Small tokenizers of the kinds that language models come with, built in memory."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_compete.language.templates import set_chat_template

_TEXTS = [
    "What color is the circle? red",
    "USER: ASSISTANT: a user and an assistant",
    "system user assistant model",
] * 3


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _unigram_vocabulary() -> list[tuple[str, float]]:
    """SentencePiece's layout: control symbols and bytes inside the vocabulary, then words and characters."""
    words = ["▁", "▁user", "▁assistant", "▁color", "▁red", "ed", "color", "the", "▁the", "\n\n", "INST", "▁ASSISTANT"]
    characters = [chr(code) for code in range(33, 127)] + ["\n", "Ġ"]  # a letter, which Llama 2's has, too
    return [
        *(("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)),
        *((f"<0x{byte:02X}>", -12.0) for byte in range(256)),
        *((word, -2.0 - index / 10) for index, word in enumerate(words)),
        *((character, -8.0 - index / 100) for index, character in enumerate(characters)),
    ]


_STRIP_FIRST_SPACE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _unigram() -> Tokenizer:
    """SentencePiece unigram in its present spelling: a space before the first word of a text."""
    tokenizer = Tokenizer(models.Unigram(_unigram_vocabulary(), unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = _STRIP_FIRST_SPACE
    return tokenizer


def _legacy_llama() -> Tokenizer:
    """Llama 2's file: no pre-tokenizer, a normalizer that writes a space before every stretch of text."""
    tokenizer = Tokenizer(models.Unigram(_unigram_vocabulary(), unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = _STRIP_FIRST_SPACE
    return tokenizer


_KINDS = {
    "byte_bpe": (_byte_level, {"eos_token": "<eos>", "pad_token": "<pad>"}),
    "byte_bpe_pad_is_eos": (_byte_level, {"eos_token": "<eos>", "pad_token": "<eos>"}),
    "byte_bpe_bos": (_byte_level, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "unigram": (_unigram, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}),
    "unigram_no_bos": (_unigram, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}),
    "legacy_llama": (_legacy_llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
TOKENIZER_KINDS = tuple(_KINDS)


@cache
def make_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind with an image token and one of our chat templates."""
    build, special = _KINDS[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build(), clean_up_tokenization_spaces=False, **special)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    set_chat_template(tokenizer, template)
    return tokenizer
