"""One memory-mapped Arrow table of rows, checked to be whole when it is opened.

Columns: id (null where the row has none), messages (JSON), images (path or bytes each), page_words
(JSON, null without) and chars (length of all text).
"""

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets.table import MemoryMappedTable

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.string(),
        "images": pa.list_(pa.struct({"path": pa.string(), "bytes": pa.large_binary()})),
        "page_words": pa.string(),
        "chars": pa.int32(),
    }
)
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # closes an Arrow stream; one that is cut between batches lacks it
_READS_HELD = 200  # a read maps up to 64 KiB around the row


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


def open_table(path: Path) -> MappedTable | None:
    """The table at a path; None if there is none, or none that is whole."""
    if not path.is_file():
        return None
    try:
        return MappedTable(str(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.warning("%s: not a whole table (%s): it is made again", path, str(error).split("\n")[0])
        return None
