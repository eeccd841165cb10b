"""Source files to memory-mapped Arrow tables, converted once and found again by the content's digest.

A table has the columns id, messages (JSON), images (path or bytes each) and chars (length of all text). Rows stay on
disk: worker processes and ranks share the pages. Caller: `data.dataset`.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.table import MemoryMappedTable
from filelock import FileLock

from llava_compete.data.config import SourceSection
from llava_compete.data.readers import read_rows, source_digest
from llava_compete.data.records import Conversation, RecordError, parse_row
from llava_compete.errors import UserError

_FORMAT = "2"  # part of the cache key: raise when the columns or the meaning of a row change
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.string(),
        "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.binary()})),
        "chars": pa.int32(),
    }
)
_ROWS_PER_BATCH = 1000
_READS_HELD = 200  # a read maps up to 64 KiB around the row


class MappedTable(MemoryMappedTable):
    """A memory-mapped table of `datasets` that lets pages go: reading all rows does not make a process hold the file.

    The pages stay in the system's cache, for all processes. Pickled, it is its path.
    """

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        super().__init__(pa.ipc.open_stream(pa.py_buffer(self._pages)).read_all(), path)
        self._reads = 0

    def __reduce__(self) -> tuple[type[MappedTable], tuple[str]]:
        return MappedTable, (self.path,)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.row, range(self.num_rows))

    def row(self, number: int) -> dict[str, Any]:
        """One row, copied out of the file."""
        self._reads += 1
        if self._reads % _READS_HELD == 0:
            self._pages.madvise(mmap.MADV_DONTNEED)
        return self.fast_slice(number, 1).to_pylist()[0]


class SourceTable(NamedTuple):
    """Rows of one source, and the digest of the file they came from."""

    section: SourceSection
    rows: MappedTable
    digest: str


def cache_folder(cache_dir: Path | None) -> Path:
    """Where tables and remembered digests lie."""
    return cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "llava_compete"


def load_source(section: SourceSection, cache_dir: Path | None = None) -> SourceTable:
    """Open the table of a source, converting its files first if this content was never seen."""
    folder = cache_folder(cache_dir)
    digest = source_digest(section.path, memory=folder / "digests")
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{digest[:32]}-{_FORMAT}.arrow"
    with FileLock(f"{table}.lock"):
        if not table.exists():
            partial = table.with_suffix(f".{os.getpid()}.partial")
            try:
                _convert(section, partial)
                partial.rename(table)
            finally:
                partial.unlink(missing_ok=True)
    rows = MappedTable(str(table))
    if len(rows) == 0:
        raise UserError(f"data source {section.name!r}: {section.path} holds no rows")
    return SourceTable(section, rows, digest)


def to_columns(conversation: Conversation) -> dict[str, Any]:
    """One table row."""
    texts = (part.get("text", "") for message in conversation.messages for part in message["content"])
    return {
        "id": conversation.id,
        "messages": json.dumps(conversation.messages, ensure_ascii=False),
        "images": [
            {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": image, "bytes": None}
            for image in conversation.images
        ],
        "chars": sum(map(len, texts)),
    }


def _convert(section: SourceSection, target: Path) -> None:
    bad, num_bad = "", 0
    batch: list[dict[str, Any]] = []
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for number, row in enumerate(read_rows(section.path)):
            try:
                if isinstance(row, RecordError):
                    raise row
                batch.append(to_columns(parse_row(row, default_id=str(number))))
            except RecordError as error:
                bad = bad or f"row {number}: {error}"
                num_bad += 1
            if len(batch) == _ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
    if bad:
        raise UserError(
            f"data source {section.name!r}: {num_bad} rows of {section.path} cannot be used, the first: {bad} "
            "(`llava-compete data check` lists all and can write the good ones)"
        )
