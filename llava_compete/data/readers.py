"""Raw rows of a source, whatever its format: one row at a time, so that no file is ever whole in memory.

`.json` (one list), `.jsonl`, `.parquet`, and folders of parquet files or of webdataset-like tars
(files of one base name are a row, `.json` holds the turns and image files the images). Also the digest of a
source's content, remembered by path, size and time. Callers: `data.tables`, `data.check`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_compete.data.records import RecordError
from llava_compete.errors import UserError

_CHUNK = 1 << 20  # characters
_PARQUET_BATCH = 64  # rows: embedded images make them large
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def source_files(path: Path) -> list[Path]:
    """The files of a source in order; a missing, unknown or empty one is a `UserError`."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.tar"))
        if not files:
            raise UserError(f"{path}: no .parquet and no .tar file in this folder")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".json", ".jsonl", ".parquet", ".tar"):
        raise UserError(
            f"{path}: found {path.suffix or 'no suffix'!r}, expected .json, .jsonl, .parquet, .tar or a folder"
        )
    return [path]


def read_rows(path: Path) -> Iterator[Any]:
    """All rows of a source; a line or stretch that is not JSON comes as a `RecordError` in place of a row."""
    for file in source_files(path):
        if file.suffix == ".json":
            with file.open(encoding="utf-8", errors="replace") as stream:
                yield from _json_list(stream, file)
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8", errors="replace") as stream:
                yield from _json_lines(stream)
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
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            memory.mkdir(parents=True, exist_ok=True)
            remembered.write_text(digest)
        total.update(f"{file.suffix}\0{remembered.read_text()}\0".encode())
    return total.hexdigest()


def _json_list(stream: TextIO, file: Path) -> Iterator[Any]:
    """Items of one JSON list, decoded as they are read."""
    decoder = json.JSONDecoder()
    buffer = stream.read(_CHUNK).lstrip("\ufeff \t\r\n")
    if not buffer.startswith("["):
        raise UserError(f"{file}: expected a JSON list of rows, found {buffer[:20]!r}")
    position, first = 1, True
    while True:
        buffer, position = _skip_space(stream, buffer, position)
        if buffer[position : position + 1] == "]":
            return
        if not first:
            if buffer[position : position + 1] != ",":
                yield RecordError(
                    "not_json", f"{file}: found {buffer[position : position + 20]!r}, expected ',' or ']'"
                )
                return
            buffer, position = _skip_space(stream, buffer, position + 1)
        # A number at the end of the buffer could go on: an item counts once something follows it.
        while True:
            try:
                item, end = decoder.raw_decode(buffer, position)
                if end < len(buffer):
                    break
            except json.JSONDecodeError as error:
                problem = error
            more = stream.read(max(_CHUNK, len(buffer)))
            if not more:
                yield RecordError("not_json", f"{file}: not valid JSON from here: {problem}")
                return
            buffer, position = buffer[position:] + more, 0
        yield item
        position, first = end, False
        if position > _CHUNK:
            buffer, position = buffer[position:], 0


def _skip_space(stream: TextIO, buffer: str, position: int) -> tuple[str, int]:
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n":
            position += 1
        if position < len(buffer):
            return buffer, position
        buffer, position = stream.read(_CHUNK), 0
        if not buffer:
            return "", 0


def _json_lines(stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield RecordError("not_json", f"line {number}: {error}")


def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a parquet file that can be read: {error}") from error


def _tar(file: Path) -> Iterator[Any]:
    """Rows of a tar: `KEY.json` with the turns, `KEY.jpg` (or KEY.0.jpg, KEY.1.jpg …) with the images, side by side.

    Read by hand: `datasets` refuses a tar in which some rows have an image and some have none.
    """
    try:
        with tarfile.open(file) as tar:
            files = ((_key_and_suffix(member.name), tar.extractfile(member)) for member in tar if member.isfile())
            named = ((*name, stream.read()) for name, stream in files if stream is not None)
            for key, group in itertools.groupby(named, key=lambda entry: entry[0]):
                yield _tar_row(file, key, {suffix: content for _, suffix, content in group})
    except (tarfile.TarError, EOFError, OSError) as error:
        yield RecordError("not_json", f"{file}: the tar breaks off here: {error}")


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix


def _tar_row(file: Path, key: str, parts: dict[str, bytes]) -> Any:
    images = [parts[name] for name in sorted(parts) if name.rsplit(".", 1)[-1].lower() in _IMAGE_SUFFIXES]
    try:
        content = json.loads(parts["json"])
    except KeyError:
        return RecordError("no_conversation", f"{file}: {key} has no .json file with the turns")
    except ValueError as error:
        return RecordError("not_json", f"{file}: {key}.json: {error}")
    if not isinstance(content, dict):
        return content
    embedded = [{"bytes": image, "path": None} for image in images]
    return {"id": key.rsplit("/", 1)[-1], **content, **({"image": embedded} if embedded else {})}
