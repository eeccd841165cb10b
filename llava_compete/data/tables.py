"""Source files to memory-mapped Arrow tables, one a file, converted once and found again by the file's digest.

A table has the columns id (null where the row has none), messages (JSON), images (path or bytes each) and chars (length
of all text). Rows stay on disk: worker processes and ranks share the pages.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable
from filelock import FileLock
from tqdm import tqdm

from llava_compete.data.config import SourceSection
from llava_compete.data.readers import format_of, read_file
from llava_compete.data.records import Conversation, message_texts, parse_row
from llava_compete.data.row_errors import RecordError
from llava_compete.data.row_images import images_first
from llava_compete.data.source_files import file_digests, source_digest, source_files
from llava_compete.errors import UserError, and_more

logger = logging.getLogger(__name__)

_FORMAT = "4"  # part of a table's name: raise when the columns or the meaning of a row change
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.string(),
        "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.large_binary()})),
        "chars": pa.int32(),
    }
)
_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 64 << 20
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # closes an Arrow stream; one that is cut between batches lacks it
_READS_HELD = 200  # a read maps up to 64 KiB around the row
_MAX_WORKERS = 16


class MappedTable(MemoryMappedTable):
    """A memory-mapped table of `datasets` that lets pages go: reading all rows does not make a process hold the file.

    The pages stay in the system's cache, for all processes. Pickled, it is its path.
    """

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._pages[-len(_STREAM_END) :] != _STREAM_END:
            raise pa.ArrowInvalid(f"{path}: the table breaks off")
        super().__init__(pa.ipc.open_stream(pa.py_buffer(self._pages)).read_all(), path)
        self._reads = 0

    def __reduce__(self) -> tuple[type[MappedTable], tuple[str]]:
        return MappedTable, (self.path,)

    def row(self, number: int) -> dict[str, Any]:
        """One row, copied out of the file."""
        self._reads += 1
        if self._reads % _READS_HELD == 0:
            self._pages.madvise(mmap.MADV_DONTNEED)
        return self.fast_slice(number, 1).to_pylist()[0]


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
        UserError: rows that cannot be used, no rows at all, or a cache folder that cannot be written to.
    """
    folder = cache_folder(cache_dir)
    files = source_files(section.path)
    digests = file_digests(files, memory=folder / "digests")
    paths = []
    for file, digest in zip(files, digests, strict=True):
        known = format_of(file)
        assert known is not None
        paths.append(folder / f"{digest[:32]}-{known.kind}-{_FORMAT}.arrow")
    tables = {path: _open_table(path) for path in paths}
    missing = {path: file for path, file in zip(paths, files, strict=True) if tables[path] is None}
    if missing:
        _convert_all(section, folder, missing)
        tables |= {path: _open_table(path) for path in missing}
    rows = Rows([table for path in paths if (table := tables[path]) is not None])
    if len(rows) == 0:
        raise UserError(f"data source {section.name!r}: {section} holds no rows")
    return SourceTable(section, rows, source_digest(files, digests))


def to_columns(conversation: Conversation) -> dict[str, Any]:
    """One table row."""
    return {
        "id": conversation.id or None,
        "messages": json.dumps(conversation.messages, ensure_ascii=False),
        "images": [
            {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": image, "bytes": None}
            for image in conversation.images
        ],
        "chars": sum(map(len, message_texts(conversation.messages))),
    }


def _open_table(path: Path) -> MappedTable | None:
    """The table at a path; None if there is none, or none that is whole."""
    if not path.is_file():
        return None
    try:
        return MappedTable(str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.warning("%s: not a whole table (%s): it is made again", path, str(error).split("\n")[0])
        return None


class _Outcome(NamedTuple):
    """What converting one file came to; `bad` rows are an error."""

    bad: int
    first: str
    ignored: list[str]


def _convert_all(section: SourceSection, folder: Path, missing: dict[Path, Path]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = _outcomes(missing)
    except OSError as error:
        raise UserError(
            f"{folder}: tables of data source {section.name!r} cannot be written: {error}; "
            "make room, or set data.cache_dir to another folder"
        ) from error
    ignored = sorted({key for outcome in outcomes for key in outcome.ignored})
    if ignored:
        logger.warning("data source %r: keys that nothing reads: %s", section.name, and_more(ignored, 10))
    bad = [outcome for outcome in outcomes if outcome.bad]
    if bad:
        raise UserError(
            f"data source {section.name!r}: {sum(outcome.bad for outcome in bad)} rows of {section} cannot be used, "
            f"the first: {bad[0].first} (`llava-compete data check` lists all and can write the good ones)"
        )


def _outcomes(missing: dict[Path, Path]) -> list[_Outcome]:
    """Convert each file to the table at its path; several at a time, in processes of their own."""
    workers = min(len(missing), len(os.sched_getaffinity(0)), _MAX_WORKERS)
    bar = tqdm(total=len(missing), unit=" files", desc="converting", delay=5)  # silent for five seconds
    with bar:
        if workers == 1:
            outcomes = []
            for path, file in missing.items():
                outcomes.append(_convert(file, path))
                bar.update()
            return outcomes
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            tasks = [pool.submit(_convert, file, path) for path, file in missing.items()]
            try:
                for task in as_completed(tasks):
                    task.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise UserError(
                    f"{next(iter(missing.values())).parent}: a process that converted files died (out of memory?); "
                    "the same command goes on with the files that are left"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
            return [task.result() for task in tasks]


def _convert(file: Path, target: Path) -> _Outcome:
    """Write one table beside its place and rename it; no table if a row is bad."""
    with FileLock(f"{target}.lock"):
        if _open_table(target) is not None:  # another process was faster
            return _Outcome(0, "", [])
        for left_over in target.parent.glob(f".{target.name}.*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            outcome = _write_table(file, partial)
            if not outcome.bad:
                partial.replace(target)
            return outcome
        finally:
            partial.unlink(missing_ok=True)


def _write_table(file: Path, partial: Path) -> _Outcome:
    with partial.open("wb") as sink:
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            outcome = _write_rows(file, writer)
        sink.flush()
        os.fsync(sink.fileno())
    return outcome


def _write_rows(file: Path, writer: pa.RecordBatchWriter) -> _Outcome:
    bad, first, ignored = 0, "", set[str]()
    batch: list[dict[str, Any]] = []
    size = 0
    for number, row in enumerate(read_file(file)):
        try:
            if isinstance(row, RecordError):
                raise row
            conversation = parse_row(row, default_id="")
        except RecordError as error:
            first = first or f"row {number} of {file.name}: {error}"
            bad += 1
            continue
        ignored.update(text for kind, text in conversation.notes if kind == "field_ignored")
        batch.append(to_columns(conversation))
        # By bytes, too: a thousand rows with embedded images can be more than an Arrow column holds.
        size += sum(len(image) for image in conversation.images if isinstance(image, bytes))
        if len(batch) == _ROWS_PER_BATCH or size >= _BYTES_PER_BATCH:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
            batch, size = [], 0
    if batch:
        writer.write_batch(pa.RecordBatch.from_pylist(batch, _SCHEMA))
    return _Outcome(bad, first, sorted(ignored))
