"""One memory-mapped Arrow table of rows, checked to be whole when it is opened.

Columns: id (null where the row has none), messages (JSON), images (path or bytes each), page_words
(JSON, null without) and chars (length of all text).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
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
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


class _Pages:
    """A file in memory, read as its pages are asked for, and not held open.

    Python's mmap keeps each file open, and a source may have more files than a process may; Arrow's asks for the whole
    file at once.
    """

    def __init__(self, path: str) -> None:
        self.address: int | None = None
        with Path(path).open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            address = _LIBC.mmap(
                None, ctypes.c_size_t(self.size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0)
            )
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        self.address = address

    def let_go(self) -> None:
        """The pages leave this process and stay in the system's cache."""
        _LIBC.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        if self.address is not None:
            _LIBC.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size))


class MappedTable(MemoryMappedTable):
    """A memory-mapped table of `datasets` that lets pages go: reading all rows does not make a process hold the file.

    The pages stay in the system's cache, for all processes. Pickled, it is its path.
    """

    def __init__(self, path: str) -> None:
        self._pages = _Pages(path)
        whole = pa.foreign_buffer(self._pages.address, self._pages.size, self._pages)
        if whole.slice(max(0, whole.size - len(_STREAM_END))).to_pybytes() != _STREAM_END:
            raise pa.ArrowInvalid(f"{path}: the table breaks off")
        super().__init__(pa.ipc.open_stream(whole).read_all(), path)
        self._reads = 0

    def __reduce__(self) -> tuple[type[MappedTable], tuple[str]]:
        return MappedTable, (self.path,)

    def row(self, number: int) -> dict[str, Any]:
        """One row, copied out of the file."""
        self._reads += 1
        if self._reads % _READS_HELD == 0:
            self._pages.let_go()
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
