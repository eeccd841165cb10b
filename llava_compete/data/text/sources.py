"""Documents of a `TextSource`, one string at a time, from any position on.

Everything is read in the order of the files, so a document's number is its identity: (epoch, number) is a position
that a resumed run can start from. Skipping reads lines without parsing them, and parquet by row-group counts.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_compete.data.compressed import open_text, plain_suffix
from llava_compete.data.source_files import SourceError, matching_files, one_split
from llava_compete.data.strict_json import DECODER, UNDECODABLE
from llava_compete.data.text.config import TextSection, TextSource
from llava_compete.errors import UserError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".txt.zst")
# Plain text has no documents: pieces of about this many characters, cut at line ends, stand for them.
_PIECE_CHARS = 1 << 16
_HASH_BUCKETS = 1_000_000
_DIGEST_BYTES = 1 << 20


class Document(NamedTuple):
    """One document and where it stands: its number in this epoch's order, after shuffling."""

    epoch: int
    number: int
    text: str


def list_files(source: TextSource) -> list[Path]:
    """The local files of a source, sorted.

    Raises:
        SourceError: a missing one, or several splits or kinds at once.
        UserError: an unknown one.
    """
    assert source.path is not None
    found: list[Path] = []
    for path in source.path if isinstance(source.path, list) else [source.path]:
        if path.is_dir():
            files = one_split(path, path, _of_folder(path))
        elif path.is_file():
            files = [path]
        else:
            files = matching_files(path) if has_magic(str(path)) else []
        if not files:
            raise SourceError(
                f"{path}: no text file found; expected a file, directory or glob of {', '.join(_SUFFIXES)}"
            )
        found += files
    unknown = [file for file in found if not file.name.endswith(_SUFFIXES)]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")
    return found


def _of_folder(folder: Path) -> list[Path]:
    """All text files below a folder but hidden ones, such as an editor's copies; of one kind: a list of checksums in a
    .txt file beside shards of .jsonl is no text to learn."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.name.endswith(_SUFFIXES) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    kinds = sorted({plain_suffix(file) for file in files})
    if len(kinds) > 1:
        raise SourceError(f"{folder}: both {' and '.join(kinds)} files in this folder; name those that count")
    return files


def digest(source: TextSource) -> str:
    """Changes when the documents do: name, size, head and tail of each local file; name and revision on the hub."""
    state = hashlib.blake2b(digest_size=16)
    if source.hub is not None:
        state.update(repr((source.hub, source.subset, source.split, source.revision, source.field)).encode())
        return state.hexdigest()
    for file in list_files(source):
        size = file.stat().st_size
        state.update(f"{file.name} {size} {source.field}\n".encode())
        with file.open("rb") as stream:
            state.update(stream.read(_DIGEST_BYTES))
            stream.seek(max(0, size - _DIGEST_BYTES))
            state.update(stream.read())
    return state.hexdigest()


def read_source(source: TextSource, skip: int = 0) -> Iterator[str]:
    """Documents of one pass over a source, without the first `skip`."""
    if source.hub is not None:
        yield from map(_encodable, _read_hub(source, skip))
        return
    for file in list_files(source):
        for text in _read_file(file, source.field, skip):
            if isinstance(text, _Skipped):
                skip = max(0, skip - text.documents)
            else:
                yield _encodable(text)


def _encodable(text: str) -> str:
    """The text without half surrogate pairs, which JSON can spell but UTF-8 and the tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split that is chosen by hash."""
    return zlib.crc32(text.encode()) % _HASH_BUCKETS < fraction * _HASH_BUCKETS


def read_validation(section: TextSection) -> Iterator[str]:
    """Documents of the held-out shard, or of the held-out fraction; nothing if the section has neither."""
    if section.validation is not None:
        yield from read_source(section.validation)
    elif section.validation_fraction:
        yield from (text for text in read_source(section.train) if is_held_out(text, section.validation_fraction))


def read_train(section: TextSection, seed: int, epoch: int = 0, number: int = 0) -> Iterator[Document]:
    """Training documents from a position on, epoch after epoch without end.

    Inside a block of `shuffle_block` documents the order is a permutation drawn from (seed, epoch, block), so any
    position can be reached without the blocks before it.
    """
    block_size = section.shuffle_block or 1
    fraction = 0.0 if section.validation is not None else section.validation_fraction
    while True:
        first_block = number // block_size
        read = given = 0
        for index, block in enumerate(_blocks(section.train, block_size, first_block), start=first_block):
            read += len(block)
            order = _permutation(len(block), seed, epoch, index) if section.shuffle_block else range(len(block))
            for place, chosen in enumerate(order, start=index * block_size):
                if place >= number and not (fraction and is_held_out(block[chosen], fraction)):
                    given += 1
                    yield Document(epoch, place, block[chosen])
        if not given and number == 0:
            name = section.train.path or section.train.hub
            raise UserError(f"{name}: found {read} documents and none to train on (the held-out share is {fraction})")
        epoch, number = epoch + 1, 0


def _permutation(size: int, seed: int, epoch: int, block: int) -> Iterator[int]:
    return map(int, np.random.default_rng((seed, epoch, block)).permutation(size))


def _blocks(source: TextSource, size: int, first: int) -> Iterator[list[str]]:
    block: list[str] = []
    for text in read_source(source, skip=first * size):
        block.append(text)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


class _Skipped(NamedTuple):
    """A reader's word that it has left out this many documents, since it was asked to."""

    documents: int


def _read_file(file: Path, field: str, skip: int) -> Iterator[str | _Skipped]:
    if file.name.endswith(".parquet"):
        yield from _read_parquet(file, field, skip)
        return
    is_json = ".jsonl" in file.suffixes
    with open_text(file, "utf-8-sig", newline="\n" if is_json else None) as stream:
        try:
            if is_json:
                yield from _read_jsonl(file, stream, field, skip)
            else:
                yield from _read_text(stream, skip)
        except _READ_ERRORS as error:
            raise UserError(f"{file}: cannot be read to its end: {error}") from error


def _read_jsonl(file: Path, stream: io.TextIOBase, field: str, skip: int) -> Iterator[str | _Skipped]:
    number = 0
    for line in stream:
        if not line.strip():
            continue
        number += 1
        if number <= skip:
            continue
        yield _text_of(line, field, f"{file}: line {number}")
    yield _Skipped(min(number, skip))


def _text_of(line: str, field: str, place: str) -> str:
    try:
        row = DECODER.decode(line)
    except UNDECODABLE as error:
        raise UserError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{place}: expected an object with a text under {field!r}, found {found}")
    return row[field]


def _read_text(stream: io.TextIOBase, skip: int) -> Iterator[str | _Skipped]:
    number, piece, size = 0, [], 0
    for line in stream:
        piece.append(line)
        size += len(line)
        if size >= _PIECE_CHARS:
            number += 1
            if number > skip:
                yield "".join(piece)
            piece, size = [], 0
    if piece:
        number += 1
        if number > skip:
            yield "".join(piece)
    yield _Skipped(min(number, skip))


def _read_parquet(file: Path, field: str, skip: int) -> Iterator[str | _Skipped]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a parquet file: {error}") from error
    if field not in table.schema_arrow.names:
        raise UserError(f"{file}: expected a column {field!r}, found {', '.join(table.schema_arrow.names)}")
    left = skip
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if left >= rows:
            left -= rows
            continue
        try:
            texts = table.read_row_group(group, columns=[field]).column(field).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: row group {group} cannot be read: {error}") from error
        for row, text in enumerate(texts[left:], start=left):
            if not isinstance(text, str):
                raise UserError(
                    f"{file}: row group {group}, row {row}: expected a text under {field!r}, found {text!r}"
                )
            yield text
        left = 0
    yield _Skipped(skip - left)


def _read_errors() -> tuple[type[Exception], ...]:
    """What a damaged file raises; zstandard's own exception where it is installed, being needed for .zst files only."""
    common = (UnicodeDecodeError, EOFError, OSError, zlib.error)
    try:
        from zstandard import ZstdError
    except ImportError:
        return common
    return (*common, ZstdError)


_READ_ERRORS = _read_errors()


def _read_hub(source: TextSource, skip: int) -> Iterator[str]:
    from datasets import load_dataset

    try:
        stream: Any = load_dataset(
            source.hub, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"hub data set {source.hub!r}: {str(error).splitlines()[0]}") from error
    for row in stream.skip(skip):
        if not isinstance(row.get(source.field), str):
            raise UserError(f"{source.hub}: expected a text under {source.field!r}, found columns {', '.join(row)}")
        yield row[source.field]
