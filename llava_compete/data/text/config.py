"""The `data` section of language pre-training: where the text comes from and how it is packed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError


class TextSource(StrictConfig):
    """Documents from local files (`path`) or from the hub through `datasets` in streaming mode (`hub`).

    path: a file, a directory or a glob, or a list of them: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt(.gz, .zst).
    hub, subset, split, revision: as in `datasets.load_dataset(hub, subset, split=split, revision=revision)`, for
        example hub: cerebras/SlimPajama-627B, or hub: HuggingFaceFW/fineweb-edu with subset: sample-10BT.
    field: the column that holds a document's text.
    """

    path: Path | list[Path] | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str = "text"

    @model_validator(mode="after")
    def _one_place(self) -> TextSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


class TextSection(StrictConfig):
    """Text for language pre-training.

    context: tokens of a row; documents, each closed by the end token, are packed into full rows.
    separate_documents: attention and positions start again at each document of a row.
    validation: the held-out shard; without it `validation_fraction` of the documents, chosen by a hash of their text.
    shuffle_block: documents are shuffled inside blocks of this many, anew in each epoch; 0 keeps the files' order.
    shards: independent packing streams; ranks share them out, so at most this many ranks divide the tokenising.
    """

    train: TextSource
    validation: TextSource | None = None
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    max_validation_rows: int = Field(default=256, ge=1)
    context: int = Field(default=1024, ge=8)
    separate_documents: bool = False
    shuffle_block: int = Field(default=10_000, ge=0)
    shards: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one_validation(self) -> TextSection:
        if self.validation is not None and self.validation_fraction:
            raise ValueError("validation_fraction: remove it, for validation names a held-out shard")
        return self

    def check_context(self, context: int | None) -> None:
        """Refuse rows longer than the language model's context, at which training would end at once."""
        if context is not None and self.context > context:
            raise UserError(f"data.context: found {self.context}, but the language model's is {context} tokens")
