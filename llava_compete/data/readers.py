"""Raw rows of one file, by its suffix: one row at a time, so that no file is ever whole in memory.

A new format is one function from a path to rows, and one line of `FORMATS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_compete.data.compressed import COMPRESSIONS, plain_suffix
from llava_compete.data.json_rows import read_json, read_json_lines
from llava_compete.data.row_errors import RecordError
from llava_compete.data.tar_rows import read_tar
from llava_compete.errors import UserError

_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 64
_PAGE_BUFFER = 8 << 20  # bytes of a column that are read at a time


def _read_parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, buffer_size=_PAGE_BUFFER, page_checksum_verification=True) as table:
        if twice := [name for name, count in Counter(table.schema_arrow.names).items() if count > 1]:
            raise ValueError(f"the column {twice[0]!r} stands twice")  # and only the last would be read
        size = sum(table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups))
        # By bytes: a batch of embedded images must stay far below the 2 GiB that a column of it can hold.
        rows = int(_BATCH_BYTES * table.metadata.num_rows / size) if size else 1
        for batch in table.iter_batches(batch_size=min(max(rows, 1), _BATCH_ROWS)):
            yield from batch.to_pylist()


class Format(NamedTuple):
    """How files of one suffix are read: `read` yields rows, and may raise anything where the file is broken."""

    kind: str  # a folder holds files of one kind
    read: Callable[[Path], Iterator[Any]]
    compressed: bool = False  # whether the file may also be packed, as .gz or .zst


FORMATS = {
    ".json": Format("json", read_json, compressed=True),
    ".jsonl": Format("json", read_json_lines, compressed=True),
    ".parquet": Format("parquet", _read_parquet),
    ".tar": Format("tar", read_tar),
}


def format_of(file: Path) -> Format | None:
    """The format of a file by its name; None for an unknown one."""
    found = FORMATS.get(plain_suffix(file))
    packed = file.suffix in COMPRESSIONS
    return found if found is not None and (found.compressed or not packed) else None


def suffixes() -> list[str]:
    """All suffixes that can be read."""
    return [
        suffix + packing for suffix, known in FORMATS.items() for packing in ("", *(COMPRESSIONS * known.compressed))
    ]


def read_file(file: Path) -> Iterator[Any]:
    """The rows of one file; what cannot be read comes as a `RecordError` in place of a row.

    Raises:
        UserError: a package that this format needs is missing.
    """
    known = format_of(file)
    if known is None:
        raise UserError(f"{file}: found {file.suffix or 'no suffix'!r}, expected {', '.join(suffixes())}")
    rows = 0
    try:
        for row in known.read(file):
            yield row
            rows += 1
    except (UserError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - readers meet broken files with nearly any exception
        problem = f"{type(error).__name__}: {error}"
        yield RecordError("file_unreadable", f"{file}: cannot be read beyond its first {rows} rows: {problem}")
