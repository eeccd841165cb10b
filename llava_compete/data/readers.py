"""Raw rows of a source, whatever its format: one row at a time, so that no file is ever whole in memory.

`.json` (one list), `.jsonl`, `.parquet`, and folders of parquet files or of webdataset-like tars
(files of one base name are a row, `.json` holds the turns and image files the images). Also the digest of a
source's content, remembered by path, size and time. Callers: `data.tables`, `data.check`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_compete.data.records import RecordError
from llava_compete.errors import UserError

_CHUNK = 1 << 20  # characters
_PARQUET_BATCH = 64  # rows: embedded images make them large
_MAX_DEPTH = 50  # a row has five
_QUOTED = 1000  # characters of what cannot be read that are kept
# Numbers of more than 4,300 digits are a ValueError, a thousand nested lists a RecursionError.
_UNDECODABLE = (ValueError, RecursionError)
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class SourceError(UserError):
    """A source of which no file can be opened."""


def source_files(path: Path) -> list[Path]:
    """The files of a source in order; a missing, unknown or empty one is a `SourceError`."""
    if path.is_dir():
        tables, tars = sorted(path.glob("*.parquet")), sorted(path.glob("*.tar"))
        if bool(tables) == bool(tars):
            found = "both .parquet and .tar files" if tables else "no .parquet and no .tar file"
            raise SourceError(f"{path}: {found} in this folder, expected one kind")
        return tables or tars
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    if path.suffix not in (".json", ".jsonl", ".parquet", ".tar"):
        raise SourceError(
            f"{path}: found {path.suffix or 'no suffix'!r}, expected .json, .jsonl, .parquet, .tar or a folder"
        )
    return [path]


def read_rows(path: Path) -> Iterator[Any]:
    """All rows of a source; what cannot be read comes as a `RecordError` in place of a row."""
    for file in source_files(path):
        if file.suffix in (".json", ".jsonl"):
            # Bytes that are not UTF-8 become lone surrogates, which `parse_row` refuses with the row's number.
            with file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
                yield from _json_list(stream, file) if file.suffix == ".json" else _json_lines(stream, file)
        elif file.suffix == ".parquet":
            yield from _parquet(file)
        else:
            yield from _tar(file)


def source_digest(path: Path, memory: Path) -> str:
    """SHA-256 over all files of a source; `memory` is a folder that remembers files by path, size and time."""
    total = hashlib.sha256()
    for file in source_files(path):
        stat = file.stat()
        key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        remembered = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sha256"
        if not remembered.exists():
            try:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise SourceError(f"{file}: cannot be read: {error.strerror}") from error
            memory.mkdir(parents=True, exist_ok=True)
            remembered.write_text(digest)
        total.update(f"{file.suffix}\0{remembered.read_text()}\0".encode())
    return total.hexdigest()


def _json_list(stream: TextIO, file: Path) -> Iterator[Any]:
    """Items of one JSON list, decoded as they are read; after the first that is not JSON nothing can be told apart."""
    decoder = json.JSONDecoder()

    def not_json(problem: object) -> RecordError:
        rest = buffer[position : position + _QUOTED]
        return RecordError("not_json", f"{file.name}: from here on not a JSON list: {problem}", rest)

    buffer, position = _skip_space(stream, stream.read(_CHUNK), 0)
    if buffer[position : position + 1] != "[":
        found = f"{buffer[position : position + 20]!r}" if buffer else "nothing"
        yield RecordError("file_unreadable", f"{file}: found {found}, expected a JSON list of rows")
        return
    position, first = position + 1, True
    while True:
        buffer, position = _skip_space(stream, buffer, position)
        if buffer[position : position + 1] == "]":
            buffer, position = _skip_space(stream, buffer, position + 1)
            if buffer:
                yield not_json(f"found {buffer[position : position + 20]!r} after the list")
            return
        if not first:
            if buffer[position : position + 1] != ",":
                yield not_json(f"found {buffer[position : position + 20]!r}, expected ',' or ']'")
                return
            buffer, position = _skip_space(stream, buffer, position + 1)
        # A number at the end of the buffer could go on: an item counts once something follows it.
        while True:
            problem: Exception | None = None
            try:
                item, end = decoder.raw_decode(buffer, position)
                if end < len(buffer):
                    break
            except _UNDECODABLE as error:
                problem = error
            more = stream.read(max(_CHUNK, len(buffer)))
            if not more:
                break
            buffer, position = buffer[position:] + more, 0
        if problem is not None:
            yield not_json(problem)
            return
        yield _shallow(item, file.name)
        position, first = end, False
        if position > _CHUNK:
            buffer, position = buffer[position:], 0


def _shallow(item: Any, where: str) -> Any:
    """The item, or an error in its place if it is nested deeper than Python can copy between processes."""
    level = [item]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for part in level
            if isinstance(part, dict | list)
            for child in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return item
    return RecordError("not_json", f"{where}: more than {_MAX_DEPTH} levels of nesting")


def _skip_space(stream: TextIO, buffer: str, position: int) -> tuple[str, int]:
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n":
            position += 1
        if position < len(buffer):
            return buffer, position
        buffer, position = stream.read(_CHUNK), 0
        if not buffer:
            return "", 0


def _json_lines(stream: TextIO, file: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield _shallow(json.loads(line), f"{file.name}, line {number}")
        except _UNDECODABLE as error:
            yield RecordError("not_json", f"{file.name}, line {number}: {error}", line.rstrip("\n"))


def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield RecordError("file_unreadable", f"{file}: parquet cannot be read from here on: {error}")


def _tar(file: Path) -> Iterator[Any]:
    """Rows of a tar: `KEY.json` with the turns, `KEY.jpg` (or KEY.0.jpg, KEY.1.jpg …) with the images, side by side.

    Read by hand: `datasets` refuses a tar in which some rows have an image and some have none.
    """
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                next_key, suffix = _key_and_suffix(member.name)
                # The same name twice is another row of that key, not a newer version of it.
                if parts and (next_key != key or suffix in parts):
                    yield _tar_row(file, key, parts)
                    parts = {}
                key = next_key
                parts[suffix] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        yield RecordError("file_unreadable", f"{file}: the tar breaks off after {key or 'nothing'}: {error}")
        return
    if parts:
        yield _tar_row(file, key, parts)


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix


def _image_order(suffix: str) -> tuple[int, str]:
    """KEY.2.jpg comes before KEY.10.jpg."""
    number = suffix.partition(".")[0]
    return int(number) if number.isascii() and number.isdigit() else -1, suffix


def _tar_row(file: Path, key: str, parts: dict[str, bytes]) -> Any:
    names = sorted(parts, key=_image_order)
    images = [parts[name] for name in names if name.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES]
    try:
        content = json.loads(parts["json"])
    except KeyError:
        return RecordError("no_conversation", f"{file}: {key} has no .json file with the turns")
    except _UNDECODABLE as error:
        text = parts["json"].decode(errors="backslashreplace")
        return RecordError("not_json", f"{file}: {key}.json: {error}", text)
    content = _shallow(content, f"{file}: {key}.json")
    if not isinstance(content, dict):
        return content
    embedded = [{"bytes": image, "path": None} for image in images]
    return {"id": key.rsplit("/", 1)[-1], **content, **({"image": embedded} if embedded else {})}
