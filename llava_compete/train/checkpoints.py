"""Checkpoints that are whole or absent, what may be resumed, and the marks of a running and a finished stage.

A checkpoint is written under `.saving/`, marked with `complete.json` and renamed, so a kill or a full disk leaves the
last good one in place; one that goes is renamed to there before it is removed. The mark lists the files with sizes and
checksums, so one that lost or changed some later is noticed too. `run/lock` keeps a second run out; `run/finished.json`
is a stage's last file.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_compete.errors import UserError
from llava_compete.files import write_json

logger = logging.getLogger(__name__)

STAGING = ".saving"
COMPLETE = "complete.json"
FINISHED = Path("run") / "finished.json"
_BLOCK = 4 * 2**20


@contextmanager
def output_lock(output_dir: Path) -> Iterator[None]:
    """Hold `run/lock` of the directory; the system frees it when the process dies, however it dies.

    On a file system without locks (Lustre mounted without `flock`) a warning says that nothing keeps a second run out.

    Raises:
        UserError: another run holds it.
    """
    path = output_dir / "run" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{output_dir}: another run is writing here ({file.read().strip() or path})") from error
        except OSError as error:
            logger.warning("%s: no file locks here (%s): nothing keeps a second run out", output_dir, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def read_finished(output_dir: Path) -> dict[str, Any] | None:
    """What the finished stage recorded, or None."""
    path = output_dir / FINISHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def clear_finished(output_dir: Path) -> None:
    """A finished stage is made longer: it counts as finished only at its new end."""
    (output_dir / FINISHED).unlink(missing_ok=True)


def write_finished(output_dir: Path, content: dict[str, Any]) -> None:
    """Mark the stage as finished; called after everything else is on disk."""
    write_json(output_dir / FINISHED, content)


def clear_staging(output_dir: Path) -> None:
    """Remove what a killed run was in the middle of writing, or of removing."""
    if (output_dir / STAGING).exists():
        logger.warning("%s: removed a checkpoint that was not written or removed to its end", output_dir / STAGING)
        shutil.rmtree(output_dir / STAGING)


def publish(output_dir: Path, name: str, record: dict[str, Any]) -> None:
    """Mark `.saving/<name>` complete and move it into place; `record` is what a resume compares."""
    staged, target = output_dir / STAGING / name, output_dir / name
    files = {str(path.relative_to(staged)): path.stat().st_size for path in staged.rglob("*") if path.is_file()}
    write_json(staged / COMPLETE, {**record, "bytes": files, "crc32": _checksums(staged, files)})
    _sync(staged)
    if target.exists():
        _set_aside(target)
    staged.rename(target)
    _sync_entry(output_dir)
    shutil.rmtree(output_dir / STAGING)


def list_complete(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first; an incomplete one is named in a warning and left out."""
    found = []
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(numbered, key=step_of):
        if problem := _torn(path):
            logger.warning("%s: incomplete checkpoint skipped (%s)", path, problem)
        else:
            found.append(path)
    return found


def sound(output_dir: Path) -> Iterator[Path]:
    """Complete checkpoints whose files are as they were written, newest first; a damaged one is named in a warning.

    Raises:
        UserError: a checkpoint of an earlier version, which recorded too little to go on from.
    """
    for checkpoint in reversed(list_complete(output_dir)):
        if "crc32" not in mark(checkpoint):
            raise UserError(
                f"{checkpoint}: written by an earlier version of llava_compete; finish the run with that version, or "
                f"train on from its weights alone: another output_dir, and model.checkpoint={checkpoint}"
            )
        written = mark(checkpoint)["crc32"]
        found = _checksums(checkpoint, written)
        damaged = [name for name, checksum in written.items() if found[name] != checksum]
        if damaged:
            logger.warning("%s: damaged checkpoint skipped (%s is not as it was written)", checkpoint, damaged[0])
        else:
            yield checkpoint


def _checksums(directory: Path, names: Iterable[str]) -> dict[str, int]:
    """CRC-32 of each file; in threads, since a checkpoint has hundreds of gigabytes and zlib lets others run."""

    def checksum(name: str) -> int:
        value = 0
        with (directory / name).open("rb") as file:
            while block := file.read(_BLOCK):
                value = zlib.crc32(block, value)
        return value

    names = list(names)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(checksum, names), strict=True))


def _torn(checkpoint: Path) -> str | None:
    """What is missing of a checkpoint, or None."""
    try:
        sizes = mark(checkpoint)["bytes"]
    except FileNotFoundError:
        return f"no {COMPLETE}"
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{COMPLETE} is no JSON"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} should have {size} bytes, {'has another size' if path.is_file() else 'is not there'}"
    return None


def mark(checkpoint: Path) -> dict[str, Any]:
    """What was recorded when the checkpoint was complete."""
    return json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))


def rotate(output_dir: Path, limit: int | None, step: int) -> None:
    """Delete complete checkpoints beyond `limit`, the oldest first; None keeps all.

    step: of the one just written. Those of later steps go before all others: the run passed them over when it began,
        damaged or of a rate that had decayed, and would otherwise keep them in place of its own.
    """
    if limit is None or limit <= 0:
        return
    complete = sorted(list_complete(output_dir), key=lambda path: (step_of(path) <= step, step_of(path)))
    if doomed := complete[:-limit]:
        for path in doomed:
            _set_aside(path)
        shutil.rmtree(output_dir / STAGING)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were done when it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _set_aside(checkpoint: Path) -> None:
    """To where `clear_staging` finds it, should a kill come while it is removed: half of one would stay for ever."""
    (checkpoint.parent / STAGING).mkdir(exist_ok=True)
    checkpoint.rename(checkpoint.parent / STAGING / f"{checkpoint.name}.old")


def install_model(staged: Path, output_dir: Path) -> None:
    """Move the final model from `staged` into `output_dir`; `config.json` last, so no half model loads.

    What an installation that was killed has left there is replaced, and an earlier result with all of its weights: in
    other shards they would lie beside the new ones, and transformers takes one whole file before any index.
    """
    _sync(staged)
    for path in (output_dir / "config.json", *output_dir.glob("model*.safetensors*")):
        path.unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        target = output_dir / path.name
        if target.is_dir():  # `replace` takes the place of a file, not of a folder with files
            shutil.rmtree(target)
        path.replace(target)
    _sync_entry(output_dir)
    shutil.rmtree(staged.parent)


def _sync(directory: Path) -> None:
    """Force the files and folders to disk before the rename makes them count."""
    for path in (*directory.rglob("*"), directory):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
