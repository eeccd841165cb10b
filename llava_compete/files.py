"""Files and folders that are whole or absent: written beside their place, flushed to the disk, then renamed over it.

JSON lines are cut at "\n" and nowhere else. `str.splitlines` also cuts at U+2028, U+2029 and U+0085, which JSON leaves
unescaped inside strings, and would tear an answer that holds one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError

# How the name of a folder ends that is not yet whole.
PARTIAL = ".partial"


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the file at `path`; a reader sees the old content or the new, and a crash leaves one of them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps two writers of one file apart. Opened, not made by `tempfile`, it has the umask's mode.
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8 text, its line breaks as they are."""
    write_bytes(path, text.encode())


def write_figure(path: str | Path, figure: Any, dpi: int) -> None:
    """A figure of matplotlib's, of the kind that the file's name ends in."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.removeprefix("."), dpi=dpi)
    write_bytes(path, content.getvalue())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its place when all is written.

    What is left of one that fails goes, as what a kill left of an earlier one: half a model may have filled the disk.
    """
    partial = path.with_name(path.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rmdir()
    partial.rename(path)


def clear_left_over(folder: Path, older_than_s: float = 3600.0) -> None:
    """Remove what writers that were killed have left in `folder`; a younger file may still be written to."""
    for partial in folder.glob(".*.partial"):
        with suppress(OSError):  # another process may clear it, too
            if time.time() - partial.stat().st_mtime > older_than_s:
                partial.unlink()


def write_json(path: str | Path, content: Any) -> None:
    """`content` as indented JSON with a line break at its end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: no such file, or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """One JSON value a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(path: str | Path, *, may_break_off: bool = False) -> Iterator[Any]:
    """The values of a file with one JSON value a line; empty lines are left out.

    `may_break_off`: the file grows line by line, so what stands behind its last line break is not yet a row.

    Raises:
        UserError: no such file, or a line that is not JSON; names the line.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not (may_break_off and not line.endswith("\n")):
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error


def mode_by_umask(folder: str | Path, pattern: str = "*.safetensors") -> None:
    """Give files that a library made for its user alone (safetensors: 0600) the mode of any other new file."""
    umask = os.umask(0)  # there is no way to read it but to set it
    os.umask(umask)
    for path in Path(folder).glob(pattern):
        path.chmod(0o666 & ~umask)
