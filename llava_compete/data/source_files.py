"""The files of a data source, all rows of them in order, and the digest of their content.

A source's `path` is a file, a folder, a glob, or a list of these. A folder's files lie in it or, as in data sets of the
hub, one level down.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import has_magic
from pathlib import Path
from typing import Any

from llava_compete.data.readers import format_of, read_file, suffixes
from llava_compete.errors import UserError, and_more
from llava_compete.files import clear_left_over, write_text

logger = logging.getLogger(__name__)

SourcePath = Path | Sequence[Path]
# Descriptions of a data set that lie beside its rows.
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(.+?)[-_.]\d+[-_]of[-_]\d+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HASHING_THREADS = 8


class SourceError(UserError):
    """A source of which no file can be opened."""


def source_files(path: SourcePath) -> list[Path]:
    """The files of a source in order.

    Raises:
        SourceError: a missing, unknown or empty one, files of two kinds, or of several splits in one folder.
    """
    if not isinstance(path, Path):
        return [file for item in path for file in source_files(item)]
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return [_known(path)]
    if not has_magic(str(path)):
        raise SourceError(f"{path}: no such file")
    return [_known(file) for file in matching_files(path)]


def matching_files(pattern: Path) -> list[Path]:
    """The files of a glob, sorted; none, or those of several splits, are a `SourceError`."""
    base = _fixed_part(pattern)
    found = sorted(base.glob(str(pattern.relative_to(base))))
    if not found:
        raise SourceError(f"{pattern}: no file of this pattern")
    return one_split(pattern, base, found)


def base_folder(path: SourcePath) -> Path:
    """The folder that a source's image paths are relative to: of a list, that of its first item."""
    if not isinstance(path, Path):
        return base_folder(path[0])
    if path.is_dir():
        return path
    return _fixed_part(path) if has_magic(str(path)) and not path.exists() else path.parent


def read_rows(path: SourcePath) -> Iterator[Any]:
    """All rows of a source; what cannot be read comes as a `RecordError` in place of a row."""
    for file in source_files(path):
        yield from read_file(file)


def source_digest(files: Sequence[Path], digests: Sequence[str]) -> str:
    """SHA-256 over the digests of a source's files and the kinds they are read as."""
    total = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        total.update(f"{file.suffix}\0{digest}\0".encode())
    return total.hexdigest()


def file_digests(files: Sequence[Path], memory: Path) -> list[str]:
    """SHA-256 of each file; `memory` is a folder that remembers files by path, size and time.

    Raises:
        SourceError: a file that cannot be read.
    """
    clear_left_over(memory)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing leaves Python's lock
        return list(pool.map(lambda file: _file_digest(file, memory), files))


def _file_digest(file: Path, memory: Path) -> str:
    try:
        stat = file.stat()
        key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        remembered = memory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.sha256"
        # A file that a full disk left empty would make all such sources "the same": only a whole digest counts.
        if remembered.is_file() and _DIGEST.fullmatch(digest := remembered.read_text(errors="replace").strip()):
            return digest
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        write_text(remembered, digest)
    except OSError as error:
        logger.warning("%s: the digest of %s cannot be kept (%s): it is made again next time", memory, file, error)
    return digest


def _known(file: Path) -> Path:
    if not file.is_file():
        raise SourceError(f"{file}: {'a folder' if file.is_dir() else 'a pipe or device'}, expected a file")
    if format_of(file) is None:
        raise SourceError(
            f"{file}: found {file.suffix or 'no suffix'!r}, expected {', '.join(suffixes())}, a folder or a glob"
        )
    return file


def _of_folder(folder: Path) -> list[Path]:
    for pattern in ("*", "*/*"):
        files = [file for file in sorted(folder.glob(pattern)) if _holds_rows(file)]
        if files:
            kinds = sorted({known.kind for file in files if (known := format_of(file)) is not None})
            if len(kinds) > 1:
                raise SourceError(f"{folder}: both {' and '.join(kinds)} files in this folder; name those that count")
            return one_split(folder, folder, [_known(file) for file in files])
    raise SourceError(f"{folder}: no file of {', '.join(suffixes())} in this folder or one level down")


def _holds_rows(file: Path) -> bool:
    hidden = file.name.startswith((".", "_")) or file.parent.name.startswith(".")
    return not (hidden or file.name in _NO_ROWS or file.is_dir()) and format_of(file) is not None


def one_split(path: Path, base: Path, files: list[Path]) -> list[Path]:
    """The files as they are, relative to `base`; those of several splits are a `SourceError`.

    Training would run on the test rows, too.
    """
    by_split: dict[str, Path] = {}
    for file in files:
        if (split := _split_of(file.relative_to(base))) is not None:
            by_split.setdefault(split, file)
    if len(by_split) > 1:
        example = next(iter(by_split.values()))
        shard = _SHARD.match(example.name)
        pattern = example.with_name(f"{shard[1]}-*{example.suffix}") if shard else example
        raise SourceError(
            f"{path}: holds the splits {and_more(sorted(by_split))}; name the files that count, "
            f"for example path: {pattern}, or a list"
        )
    return files


def _split_of(file: Path) -> str | None:
    """A split's name among the words of a relative path, else the prefix of a numbered shard."""
    words = re.split(r"[^a-z]+", str(file).lower())
    named = next((_SPLITS[word] for word in words if word in _SPLITS), None)
    shard = _SHARD.match(file.name)
    return named or (shard[1] if shard else None)


def _fixed_part(pattern: Path) -> Path:
    """The folders before the first wildcard."""
    fixed = pattern
    while has_magic(str(fixed)):
        fixed = fixed.parent
    return fixed
