"""Files of rows or text, plain or compressed by .gz or .zst, read as a stream; one that breaks off raises an error."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_compete.errors import UserError

_CHUNK = 1 << 14  # compressed bytes read at a time; a small one bounds what a chunk can unpack to
COMPRESSIONS = (".gz", ".zst")


def open_bytes(file: Path) -> BinaryIO:
    """The unpacked bytes of a file, by its last suffix.

    While reading, broken files raise EOFError (they end inside a frame), OSError, zlib.error or zstandard's ZstdError.

    Raises:
        UserError: a .zst file without the zstandard package.
    """
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(file)))
    return file.open("rb")


def open_text(
    file: Path, encoding: str = "utf-8", errors: str = "strict", newline: str | None = "\n"
) -> io.TextIOWrapper:
    """The unpacked text of a file; lines end at "\\n" only, or with `newline=None` as in any text file."""
    return io.TextIOWrapper(open_bytes(file), encoding=encoding, errors=errors, newline=newline)


def plain_suffix(file: Path) -> str:
    """The suffix of what is inside: `.jsonl` for rows.jsonl.gz and for rows.jsonl."""
    name = file.name
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


class _ZstdFile(io.RawIOBase):
    """One frame after another. zstandard's own reader takes a file that ends inside a frame for a whole one."""

    def __init__(self, file: Path) -> None:
        self._new_frame = _frame_decoder(file)
        self._name, self._file = file.name, file.open("rb")
        self._frame: Any = None  # None between frames
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError(f"{self._name} ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _frame_decoder(file: Path) -> Callable[[], Any]:
    try:
        from zstandard import ZstdDecompressor
    except ImportError as error:
        raise UserError(f"{file}: reading .zst needs the zstandard package: pip install zstandard") from error
    return lambda: ZstdDecompressor().decompressobj()
