"""Files of rows to Arrow tables: one a file, several at a time, each written beside its place and renamed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from llava_compete.data.config import SourceSection
from llava_compete.data.mapped_table import SCHEMA, open_table
from llava_compete.data.page_words import to_json
from llava_compete.data.readers import read_file
from llava_compete.data.records import Conversation, message_texts, parse_row
from llava_compete.data.row_errors import RecordError
from llava_compete.errors import UserError, and_more
from llava_compete.processes import end_with_parent, usable_cores

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1000
_BYTES_PER_BATCH = 64 << 20
_MAX_WORKERS = 16
_SILENT_S = 5  # before a bar is shown


class _Outcome(NamedTuple):
    """What converting one file came to; `bad` rows are an error."""

    bad: int
    first: str
    ignored: list[str]


def convert_all(section: SourceSection, folder: Path, missing: dict[Path, Path]) -> None:
    """Convert files of a source to the tables at the paths `missing`, in `folder`; what is done stays done.

    Raises:
        UserError: rows that cannot be used (their file gets no table), or a folder that cannot be written to.
    """
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
    workers = min(len(missing), usable_cores(), _MAX_WORKERS)
    context = get_context("fork")
    rows = context.Value("q", 0)
    with tqdm(unit=" rows", desc="converting", delay=_SILENT_S) as bar:
        if workers == 1:
            return [_convert(file, path, bar.update) for path, file in missing.items()]
        with ProcessPoolExecutor(workers, context, _start_worker, (rows,)) as pool:
            tasks = [pool.submit(_convert_in_worker, file, path) for path, file in missing.items()]
            waiting = set(tasks)
            try:
                while waiting:
                    done, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    bar.set_postfix_str(f"{len(tasks) - len(waiting)} of {len(tasks)} files", refresh=False)
                    bar.update(rows.value - bar.n)
            except BrokenProcessPool as error:
                raise UserError(
                    f"{next(iter(missing.values())).parent}: a process that converted files died (out of memory?); "
                    "the same command goes on with the files that are left"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
            return [task.result() for task in tasks]


_rows: Any = None  # in a worker: the rows that all workers have read, in shared memory


def _start_worker(rows: Any) -> None:
    global _rows
    end_with_parent()
    _rows = rows


def _convert_in_worker(file: Path, target: Path) -> _Outcome:
    def count(number: int) -> None:
        with _rows.get_lock():
            _rows.value += number

    return _convert(file, target, count)


def _convert(file: Path, target: Path, count: Callable[[int], Any]) -> _Outcome:
    """Write one table beside its place and rename it; no table if a row is bad."""
    with FileLock(f"{target}.lock"):
        if open_table(target) is not None:  # another process was faster
            return _Outcome(0, "", [])
        for left_over in target.parent.glob(f".{target.name}.*.partial"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            outcome = _write_table(file, partial, count)
            if not outcome.bad:
                partial.replace(target)
            return outcome
        finally:
            partial.unlink(missing_ok=True)


def _write_table(file: Path, partial: Path, count: Callable[[int], Any]) -> _Outcome:
    with partial.open("wb") as sink:
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            outcome = _write_rows(file, writer, count)
        sink.flush()
        os.fsync(sink.fileno())
    return outcome


def _write_rows(file: Path, writer: pa.RecordBatchWriter, count: Callable[[int], Any]) -> _Outcome:
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
        batch.append(_to_columns(conversation))
        # By bytes, too: a thousand rows with embedded images or whole books can be more than an Arrow column holds.
        size += sum(len(image) for image in conversation.images if isinstance(image, bytes))
        size += len(batch[-1]["messages"])
        if len(batch) == _ROWS_PER_BATCH or size >= _BYTES_PER_BATCH:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
            count(len(batch))
            batch, size = [], 0
    if batch:
        writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
        count(len(batch))
    return _Outcome(bad, first, sorted(ignored))


def _to_columns(conversation: Conversation) -> dict[str, Any]:
    """One table row."""
    return {
        "id": conversation.id or None,
        "messages": json.dumps(conversation.messages, ensure_ascii=False),
        "images": [
            {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": image, "bytes": None}
            for image in conversation.images
        ],
        "page_words": to_json(conversation.words),
        "chars": sum(map(len, message_texts(conversation.messages))),
    }
