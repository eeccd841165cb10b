"""A language model that lies in a folder as one GGUF file: read by transformers, unpacked to plain weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError


def gguf_options(name: str | None) -> dict[str, Any]:
    """`gguf_file=` for transformers' loaders if `name` is a folder with a GGUF file and no `config.json`, else nothing.

    Raises:
        UserError: several such files, or the package `gguf` is not installed.
    """
    folder = Path(str(name))
    if not folder.is_dir() or (folder / "config.json").is_file():
        return {}
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return {}
    if len(files) > 1:
        raise UserError(f"{folder}: holds {len(files)} GGUF files ({files[0].name}, ...), expected one")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{files[0]}: reading GGUF needs the package gguf: pip install 'llava_compete[fetch]'")
    return {"gguf_file": files[0].name}


def set_pre_tokenizer(tokenizer: Any, file: Path) -> None:
    """Cut words as the model's own tokenizer does where transformers (5.23) reads a GGUF's otherwise.

    "smollm" means that each digit stands alone; transformers takes it for GPT-2's, where a space goes with a number.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
