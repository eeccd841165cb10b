"""What a layout of published checkpoints is: how it is told from others, and how its tensors become ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava_compete.convert.recipes import Recipe
from llava_compete.errors import UserError
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.weight_files import StoredTensor, read_headers, weight_files


@dataclass
class Source:
    """A checkpoint directory that another package wrote: its config.json, and its tensors by the layout's own names."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path, config: dict[str, Any]) -> Source:
        """With the headers of all weight files."""
        tensors: dict[str, StoredTensor] = {}
        for file in weight_files(directory):
            tensors |= read_headers(file)
        return cls(directory, config, tensors)

    def by_names(self, rename: Callable[[str], str]) -> dict[str, StoredTensor]:
        """The tensors by other names.

        Raises:
            UserError: two tensors that would have one name.
        """
        renamed: dict[str, StoredTensor] = {}
        for name, stored in self.tensors.items():
            new = rename(name)
            if new in renamed:
                raise UserError(f"{self.directory}: {renamed[new].name} and {name} are two spellings of one tensor")
            renamed[new] = stored
        return renamed


@dataclass
class Import:
    """How a source becomes a checkpoint of ours.

    tensors: what the recipes' sources are the names of; default the source's own.
    unused: stored tensors that have no part in the model, and why.
    notes: what a user must know of this import, in sentences.
    """

    config: LlavaCompeteConfig
    tokenizer: Any
    recipes: dict[str, Recipe]
    tensors: dict[str, StoredTensor]
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ImportOptions(NamedTuple):
    """What the command line may say of an import."""

    chat_template: str | None = None
    base: str | None = None
    vision_tower: str | None = None


class Layout(NamedTuple):
    """name, what is looked for in words, whether a source has it, and how it is read."""

    name: str
    looks_for: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, ImportOptions], Import]
