"""The `data` section of language pre-training: where the text comes from and how it is packed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError


class TextSource(StrictConfig):
    """Documents from local files (`path`) or from the hub through `datasets` in streaming mode (`hub`)."""

    path: Path | list[Path] | None = Field(
        default=None,
        description="A file, a folder (with all below it but hidden files, of one kind), a glob, or a list of these: "
        ".jsonl, .parquet or .txt, the first and last also as .gz or .zst.",
    )
    hub: str | None = Field(
        default=None,
        description="A data set of the hub in place of `path`, as in `datasets.load_dataset(hub, subset, split=split, "
        "revision=revision)`: cerebras/SlimPajama-627B, or HuggingFaceFW/fineweb-edu with subset "
        "sample-10BT.",
    )
    subset: str | None = Field(default=None, description="Configuration of the hub's data set.")
    split: str = Field(default="train", description="Split of the hub's data set.")
    revision: str | None = Field(default=None, description="Commit, tag or branch of the hub's data set.")
    field: str = Field(default="text", description="Column that holds a document's text.")

    @model_validator(mode="after")
    def _one_place(self) -> TextSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


class TextSection(StrictConfig):
    """Text for language pre-training."""

    train: TextSource = Field(description="The documents to train on.")
    validation: TextSource | None = Field(
        default=None, description="The held-out documents; without them `validation_fraction` holds some out."
    )
    validation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the documents that is held out, chosen by a hash of their text."
    )
    max_validation_rows: int = Field(default=256, ge=1, description="Rows of held-out text at most.")
    context: int = Field(
        default=1024,
        ge=8,
        description="Tokens of a row: documents, each closed by the end token, are packed into full rows.",
    )
    separate_documents: bool = Field(
        default=False, description="Attention and positions start again at each document of a row."
    )
    shuffle_block: int = Field(
        default=10_000,
        ge=0,
        description="Documents are shuffled inside blocks of so many, anew in each epoch; 0 keeps the files' order.",
    )
    shards: int = Field(
        default=64,
        ge=1,
        description="Independent packing streams; ranks share them out, so at most so many ranks divide the "
        "tokenising.",
    )

    @model_validator(mode="after")
    def _one_validation(self) -> TextSection:
        if self.validation is not None and self.validation_fraction:
            raise ValueError("validation_fraction: remove it, for validation names a held-out shard")
        return self

    def check_context(self, context: int | None) -> None:
        """Refuse rows longer than the language model's context, at which training would end at once."""
        if context is not None and self.context > context:
            raise UserError(f"data.context: found {self.context}, but the language model's is {context} tokens")
