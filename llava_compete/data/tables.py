"""Source files to memory-mapped Arrow tables, converted once and found again by the content's digest.

A table has the columns id, messages (JSON), images (path or bytes each) and chars (length of all text). Rows stay on
disk: worker processes and ranks share the pages. Caller: `data.dataset`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from filelock import FileLock

from llava_compete.data.config import SourceSection
from llava_compete.data.records import Conversation, RecordError, parse_row
from llava_compete.errors import UserError

_FORMAT = "1"  # part of the cache key: raise when the columns or the meaning of a row change
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


def load_source(section: SourceSection, cache_dir: Path | None = None) -> SourceTable:
    """Open the table of a source, converting the file first if this content was never seen."""
    if not section.path.is_file():
        raise UserError(f"data source {section.name!r}: {section.path}: no such file")
    with section.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "llava_compete"
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


def read_rows(path: Path) -> Iterator[Any]:
    """Rows of a LLaVA JSON or JSONL file."""
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
            return
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    yield from rows


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
    bad: list[RecordError] = []
    batch: list[dict[str, Any]] = []
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for number, row in enumerate(read_rows(section.path)):
            try:
                batch.append(to_columns(parse_row(row, default_id=str(number))))
            except RecordError as error:
                bad.append(error)
            if len(batch) == _ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
    if bad:
        raise UserError(
            f"data source {section.name!r}: {len(bad)} rows of {section.path} cannot be used, the first: {bad[0]} "
            "(`llava-compete data check` lists all and can write the good ones)"
        )
