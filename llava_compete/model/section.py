"""The `model:` section of a YAML: a checkpoint directory, or the parts a new model is put together from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig
from llava_compete.vision.tower_config import Interpolation, ResizeMode

DtypeName = Literal["float32", "bfloat16", "float16"]
AttentionName = Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"]


class PreprocessOverrides(StrictConfig):
    """What to change in the preprocessing that comes with a tower."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None


class VisionTowerSection(StrictConfig):
    """An open_clip tower: `name` (registry, `hf-hub:`, `local-dir:`) or `config` (open_clip's own dict, inline)."""

    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: str | None = None
    """open_clip's weight tag or a file; null leaves the weights random. `hf-hub:` and `local-dir:` bring theirs."""
    feature_layer: int = -2
    select: Literal["patch", "cls_patch"] = "patch"
    scales: tuple[int, ...] = (1,)
    preprocess: PreprocessOverrides = PreprocessOverrides()

    @model_validator(mode="after")
    def _one_source(self) -> VisionTowerSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name or config")
        return self


class ProjectorSection(StrictConfig):
    """The projector's type: linear, mlp2x_gelu, mlp3x_gelu, ..."""

    type: str = "mlp2x_gelu"


class LanguageModelSection(StrictConfig):
    """A Hugging Face causal LM: `name` (hub id or directory), or `config` with a model_type for random weights.

    With both, `name` gives the weights and `config` tells `plan` and tests the architecture without a download.
    """

    name: str | None = None
    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_source(self) -> LanguageModelSection:
        if self.name is None and self.config is None:
            raise ValueError("give name, config or both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config: missing key 'model_type', such as llama or qwen3")
        return self


class TokenizerSection(StrictConfig):
    """A tokenizer by `name` (hub id or directory), or one trained on the stage's own data."""

    name: str | None = None
    train_on: Literal["data"] | None = None
    vocab_size: int = Field(default=4096, ge=300)

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerSection:
        if (self.name is None) == (self.train_on is None):
            raise ValueError("give either name or train_on")
        return self


class ModelSection(StrictConfig):
    """Either `checkpoint`, or `language_model` with (for images) `vision_tower` and `projector`."""

    checkpoint: Path | None = None
    vision_tower: VisionTowerSection | None = None
    projector: ProjectorSection = ProjectorSection()
    language_model: LanguageModelSection | None = None
    tokenizer: TokenizerSection | None = None
    """Default: the language model's own."""
    chat_template: str | None = None
    """A template of `language/templates`; default: the tokenizer's, or the language model family's."""
    dtype: DtypeName = "float32"
    attention: AttentionName | None = None
    """Default: transformers' choice, sdpa wherever the family has it."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Hold the language model's frozen layers in 4 bits (NF4) or 8 with bitsandbytes; needs `checkpoint` and LoRA."""
    trust_remote_code: bool = False

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
