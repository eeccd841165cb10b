"""The rows of a source as memory-mapped tables, converted once and found again by the digest of each file.

Rows stay on disk: worker processes and ranks share the pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from llava_compete.data.config import SourceSection
from llava_compete.data.conversion import convert_all
from llava_compete.data.mapped_table import MappedTable, open_table
from llava_compete.data.readers import format_of
from llava_compete.data.row_images import images_first
from llava_compete.data.source_files import file_digests, source_digest, source_files
from llava_compete.errors import UserError

_FORMAT = "6"  # part of a table's name: raise when the columns or the meaning of a row change


class Rows:
    """The rows of a source's tables, one after the other."""

    def __init__(self, tables: list[MappedTable]) -> None:
        self.tables = tables
        self._starts = np.cumsum([0, *(table.num_rows for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.row, range(len(self)))

    def row(self, number: int) -> dict[str, Any]:
        """One row; the row's number stands in for a missing id."""
        table = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = self.tables[table].row(number - int(self._starts[table]))
        return row if row["id"] is not None else {**row, "id": str(number)}

    def ids(self) -> Iterator[str]:
        """The id of each row."""
        ids = (value.as_py() for table in self.tables for value in table.column("id"))
        return (str(number) if value is None else value for number, value in enumerate(ids))

    def chars(self) -> np.ndarray:
        """int32 [rows]: length of all text."""
        return np.concatenate([table.column("chars").to_numpy() for table in self.tables])

    def images_per_row(self) -> np.ndarray:
        """int32 [rows]."""
        chunks = (chunk for table in self.tables for chunk in table.column("images").chunks)
        counts = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int32)

    def with_words(self) -> np.ndarray:
        """bool [rows]: which have the words of their page."""
        return np.concatenate([table.column("page_words").is_valid().to_numpy() for table in self.tables])

    def image_paths(self) -> Iterator[str]:
        """The path of each image that is not embedded, in the order of the rows."""
        chunks = (chunk for table in self.tables for chunk in table.column("images").chunks)
        paths = (path.as_py() for chunk in chunks for path in chunk.flatten().field("path"))
        return (path for path in paths if path is not None)


class SourceTable(NamedTuple):
    """Rows of one source, and the digest of the files they came from."""

    section: SourceSection
    rows: Rows
    digest: str

    def messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of one of its rows, images where the source's `images_first` says."""
        messages = json.loads(row["messages"])
        return images_first(messages) if self.section.images_first else messages


def cache_folder(cache_dir: Path | None) -> Path:
    """Where tables and remembered digests lie."""
    return cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "llava_compete"


def load_source(section: SourceSection, cache_dir: Path | None = None) -> SourceTable:
    """Open the tables of a source, converting those of its files first whose content was never seen.

    Files are converted in parallel; one that is done need not be done again when the rest fails or is interrupted.

    Raises:
        UserError: rows that cannot be used, no rows at all, image paths of which it is not clear from where they
            start, or a cache folder that cannot be written to.
    """
    folder = cache_folder(cache_dir)
    files = source_files(section.path)
    digests = file_digests(files, memory=folder / "digests")
    paths = []
    for file, digest in zip(files, digests, strict=True):
        known = format_of(file)
        assert known is not None
        paths.append(folder / f"{digest[:32]}-{known.kind}-{_FORMAT}.arrow")
    tables = {path: open_table(path) for path in paths}
    missing = {path: file for path, file in zip(paths, files, strict=True) if tables[path] is None}
    if missing:
        convert_all(section, folder, missing)
        tables |= {path: open_table(path) for path in missing}
    found = [table for path in paths if (table := tables[path]) is not None]
    if len(found) < len(paths):
        broken = next(path for path in paths if tables[path] is None)
        raise UserError(f"data source {section.name!r}: {broken} was just written and cannot be opened")
    rows = Rows(found)
    if len(rows) == 0:
        raise UserError(f"data source {section.name!r}: {section} holds no rows")
    relative = next((path for path in rows.image_paths() if not os.path.isabs(path)), None)
    if relative is not None:
        section.refuse_path(relative)
    return SourceTable(section, rows, source_digest(files, digests))
