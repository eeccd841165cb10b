"""Towers and language models in files of their own, as other packages publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tiny import LANGUAGE, TEXTS, TOWER
from transformers import AutoConfig, AutoModelForCausalLM

from llava_compete.language.tokenizer import train_byte_level_bpe
from llava_compete.model.section import ModelSection

SIZES = {key: value for key, value in LANGUAGE.items() if key not in ("model_type", "tie_word_embeddings")}


def save_language_model(folder: Path, model_type: str = "llama", tied: bool = False, spare: int = 0) -> Path:
    """In several files, in bfloat16; `spare` rows of its embeddings are no token's."""
    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=320)
    extra = {"num_local_experts": 2, "num_experts_per_tok": 1} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(
        model_type, **SIZES, **extra, vocab_size=len(tokenizer) + spare, tie_word_embeddings=tied, dtype="bfloat16"
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="10KB")
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(folder: Path, pickled: bool) -> Path:
    """As open_clip publishes one: `local-dir:`."""
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(8)
    clip = open_clip.CLIP(TOWER["embed_dim"], TOWER["vision_cfg"], text)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**TOWER, "text_cfg": text}}))
    if pickled:
        torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    else:
        save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def named(tower: Path | None, language: Path, **more: Any) -> ModelSection:
    eyes = {} if tower is None else {"vision_tower": {"name": f"local-dir:{tower}"}}
    return ModelSection.model_validate(
        {**eyes, "language_model": {"name": str(language)}, "chat_template": "chatml", **more}
    )
