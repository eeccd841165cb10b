"""Source files to memory-mapped Arrow tables, converted once and found again by the content's digest.

A table has the columns id, messages (JSON), images (path or bytes each) and chars (length of all text). Rows stay on
disk: worker processes and ranks share the pages. Caller: `data.dataset`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
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


class SourceTable(NamedTuple):
    """Rows of one source, and the digest of the file they came from."""

    section: SourceSection
    rows: datasets.Dataset
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
    rows = datasets.Dataset.from_file(str(table))
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
