"""The `data` section of a training config: sources, length limit, images that fail, validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_compete.config import StrictConfig, read_yaml
from llava_compete.data.source_files import base_folder
from llava_compete.errors import UserError, and_more


class SourceSection(StrictConfig):
    """One source of a mixture; metrics keep sources apart by `name`."""

    name: str = Field(pattern=r"^[^/\s]+$")  # part of metrics' and files' names
    path: Path | list[Path]  # a file, a folder, a glob, or a list of these
    image_folder: Path | None = None  # images are named relative to it; default: `path` or its folder
    # LLaVA's own rule: a placeholder anywhere in a question is moved to its front, with a line break behind.
    images_first: bool = False
    weight: float = Field(default=1.0, gt=0)  # share of the rows shown in an epoch; 2 = each row twice
    max_rows: int | None = Field(default=None, ge=1)

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, value: Path | list[Path]) -> Path | list[Path]:
        if value == []:
            raise ValueError("an empty list names no file")
        return value

    @property
    def images(self) -> Path:
        """The folder that image paths are relative to."""
        return self.image_folder or base_folder(self.path)

    def __str__(self) -> str:
        """The path, for messages."""
        return and_more(list(map(str, self.path))) if isinstance(self.path, list) else str(self.path)


class DataSection(StrictConfig):
    """What a stage trains on. `sources` may name a mixture: a YAML file with the one key `sources`."""

    sources: list[SourceSection] = Field(min_length=1)
    max_length: int = Field(default=2048, ge=1)  # tokens, expanded image tokens included
    packing: bool = False
    on_bad_image: Literal["error", "skip"] = "error"
    max_bad_images: int = Field(default=100, ge=0)  # with "skip": more than this stops the run
    max_rejected_share: float = Field(default=0.01, ge=0, le=1)  # rows without a supervised turn in `max_length`
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    cache_dir: Path | None = None  # of the Arrow tables; default: below the cache of `datasets`

    @field_validator("sources", mode="before")
    @classmethod
    def _read_mixture(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        content = read_yaml(value)
        if list(content) != ["sources"]:
            raise ValueError(f"{value}: a mixture has the one key `sources`, found {', '.join(content) or 'none'}")
        return content["sources"]

    @model_validator(mode="after")
    def _names_are_unique(self) -> DataSection:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}: metrics could not keep them apart")
        return self

    def check_context(self, context: int | None) -> None:
        """Refuse rows longer than the language model's context, at which training would end at the first long row."""
        if context is not None and self.max_length > context:
            raise UserError(
                f"data.max_length: found {self.max_length}, but the language model's context is {context} tokens"
            )
