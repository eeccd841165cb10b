"""The `data` section of a training config: sources, length limit, images that fail, validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_compete.config import StrictConfig, read_yaml
from llava_compete.data.source_files import base_folder
from llava_compete.errors import UserError, and_more
from llava_compete.vision.naflex import SizedPictures


class SourceSection(StrictConfig):
    """One source of a mixture; metrics keep sources apart by `name`."""

    name: str = Field(
        pattern=r"^[^/\s]+$", description="Stands before the ids of its rows, and in the names of metrics and files."
    )
    path: Path | list[Path] = Field(
        description="A file, a folder of files (in it or one level down), a glob, or a list of these; the formats are "
        "in playground/README.md."
    )
    image_folder: Path | None = Field(
        default=None,
        description="Folder that image paths are relative to; by default `path` or the folder it lies in, which must "
        "be the same for all items of a list.",
    )
    images_first: bool = Field(
        default=False,
        description="Put the images of a question before its text, each on a line of its own, wherever the file has "
        "them: LLaVA's rule (`preprocess_multimodal`). Without it the text stays as it is in the file.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Times that each row is shown in an epoch. 0.5 shows one half of the rows in an epoch and the "
        "other half in the next.",
    )
    max_rows: int | None = Field(
        default=None,
        ge=1,
        description="At most so many rows, drawn by the seed and the same in each epoch; by default all.",
    )

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

    def refuse_path(self, image: str) -> None:
        """Raise a `UserError` for a relative image path where the items of `path` lie in several folders: a picture of
        this name in the first of them need not be the row's."""
        if self.image_folder is None and isinstance(self.path, list) and not Path(image).is_absolute():
            folders = sorted({str(base_folder(path)) for path in self.path})
            if len(folders) > 1:
                raise UserError(
                    f"image {image}: the files of data source {self.name!r} lie in {and_more(folders)}; "
                    "set its image_folder, or make a source of each"
                )

    def __str__(self) -> str:
        """The path, for messages."""
        return and_more(list(map(str, self.path))) if isinstance(self.path, list) else str(self.path)


class DataSection(StrictConfig):
    """What a stage trains on. `sources` may name a mixture: a YAML file with the one key `sources`."""

    sources: list[SourceSection] = Field(
        min_length=1, description="The data sets of the mixture, or the name of a YAML file with the one key `sources`."
    )
    max_length: int = Field(
        default=2048,
        ge=1,
        description="Tokens of a row at most, image tokens included; a longer one is cut behind its last whole "
        "answer. At most the language model's context.",
    )
    packing: bool = Field(
        default=False,
        description="Put several rows into one sequence of at most `max_length` tokens, each with positions and "
        "attention of its own; all losses stay what they were.",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        default="error",
        description="What a picture that cannot be decoded does: end the run, or put the next row of its source in "
        "the row's place (counted as `data/bad_images`).",
    )
    max_bad_images: int = Field(
        default=100, ge=0, description="With `on_bad_image: skip`, more bad pictures than this end the run."
    )
    max_rejected_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the rows read that may hold no answer to learn within `max_length`; more end the run. "
        "Such a row is replaced by the next of its source (counted as `data/rejected`).",
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the rows that is held out, chosen by a hash of the row's id: a row stays on its side "
        "when others come or go.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder of the converted tables, which training maps into memory; by default below the cache of "
        "Hugging Face `datasets`.",
    )

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

    def check_tiles(self, tiling: SizedPictures | None) -> None:
        """Refuse a limit that one picture of the most tokens would fill by itself."""
        if tiling is not None and (tokens := tiling.num_tokens(tiling.largest)) >= self.max_length:
            raise UserError(
                f"data.max_length: found {self.max_length}, but a picture in {tiling} makes {tokens} tokens; raise "
                f"it, or lower {tiling.setting}, or set model.projector.pool"
            )

    def check_context(self, context: int | None) -> None:
        """Refuse rows longer than the language model's context, at which training would end at the first long row."""
        if context is not None and self.max_length > context:
            raise UserError(
                f"data.max_length: found {self.max_length}, but the language model's context is {context} tokens"
            )
