"""The `language_model` and `tokenizer` sections of a YAML."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig


class LanguageModelSection(StrictConfig):
    """A Hugging Face causal LM: `name` (hub id or directory), or `config` with a model_type for random weights.

    With both, `name` gives the weights and `config` tells `plan` and tests the architecture without a download.
    """

    name: str | None = Field(default=None, description="hub id, directory, or folder with a GGUF file")
    config: dict[str, Any] | None = Field(
        default=None,
        description=(
            "architecture by transformers' own keys, with model_type: random weights, or beside a name for "
            "`plan` offline"
        ),
    )

    @model_validator(mode="after")
    def _has_source(self) -> LanguageModelSection:
        if self.name is None and self.config is None:
            raise ValueError("give name, config or both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config: missing key 'model_type', such as llama or qwen3")
        return self


class TokenizerSection(StrictConfig):
    """A tokenizer by `name` (hub id or directory), or one trained on the stage's own data."""

    name: str | None = Field(default=None, description="hub id or directory")
    train_on: Literal["data"] | None = Field(default=None, description="train a byte-level BPE on the stage's own data")
    vocab_size: int = Field(default=4096, ge=300, description="tokens of a trained one")

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerSection:
        if (self.name is None) == (self.train_on is None):
            raise ValueError("give either name or train_on")
        return self
