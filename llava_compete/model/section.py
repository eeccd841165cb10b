"""The `model:` section of a YAML: a checkpoint directory, or the parts a new model is put together from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig
from llava_compete.language.config import LanguageModelSection, TokenizerSection
from llava_compete.vision.projector import ProjectorSection
from llava_compete.vision.tower_config import VisionTowerSection

DtypeName = Literal["float32", "bfloat16", "float16"]
AttentionName = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]


class ModelSection(StrictConfig):
    """Either `checkpoint`, or `language_model` with (for images) `vision_tower` and `projector`."""

    checkpoint: Path | None = Field(default=None, description="directory that a stage wrote; brings the whole model")
    vision_tower: VisionTowerSection | None = Field(
        default=None, description="the tower of a new model; none makes it text-only"
    )
    projector: ProjectorSection = Field(default=ProjectorSection(), description="between tower and language model")
    language_model: LanguageModelSection | None = Field(default=None, description="of a new model")
    tokenizer: TokenizerSection | None = Field(default=None, description="default: the language model's own")
    chat_template: str | None = Field(
        default=None,
        description=(
            "a template of `language/templates`; default: the tokenizer's own, or the language model family's"
        ),
    )
    dtype: DtypeName = Field(default="float32", description="of the weights in memory")
    attention: AttentionName | None = Field(
        default=None, description="attention kernel; default: transformers' choice, sdpa wherever the family has it"
    )
    tile_batch: int | None = Field(
        default=None,
        ge=1,
        description=(
            "tiles (or pictures) that pass through the tower at once, which bounds the memory of a frozen tower, or "
            "of one with activation checkpointing; default all of a micro-batch"
        ),
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description=(
            "hold the language model's frozen layers in 4 bits (NF4) or 8 with bitsandbytes; needs checkpoint and LoRA"
        ),
    )
    trust_remote_code: bool = Field(default=False, description="run Python files that come with a language model")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        parts = [key for key in ("vision_tower", "language_model", "tokenizer") if getattr(self, key) is not None]
        if self.checkpoint is not None and parts:
            raise ValueError(f"checkpoint brings the whole model; remove {', '.join(parts)}")
        if self.checkpoint is None and self.language_model is None:
            raise ValueError("give either checkpoint or language_model")
        if self.language_model is not None and self.language_model.name is None and self.tokenizer is None:
            raise ValueError("tokenizer: needed, since language_model has no name to take one from")
        if self.quantization is not None and self.checkpoint is None:
            raise ValueError(f"quantization: found {self.quantization}, which needs model.checkpoint")
        return self
