"""Packages of PyPI and npm: downloaded by name with the registry's own client, checked by SHA-256, read as archives."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_compete.errors import UserError

_TIMEOUT_SECONDS = 3600
_LICENCE = re.compile(r"(^|/)(licen[cs]e|copying|notice)[^/]*$", re.IGNORECASE)


class UnreachableError(UserError):
    """A registry did not give a package: no network, no such version, no client."""


@dataclass(frozen=True)
class Package:
    """One version of a package, pinned by the SHA-256 of its file: a wheel (pypi) or a tarball (npm)."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.registry == "pypi" else f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """Name of its file in a folder of downloads."""
        stem = f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"
        return f"{stem}.whl" if self.registry == "pypi" else f"{stem}.tgz"


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is already there; `UserError` if its digest is another."""
    folder = folder.resolve()  # the client runs in another folder, so a relative path would be another place
    file = folder / package.file_name
    if file.is_file() and sha256_of(file) == package.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run(package, _pip(package, scratch) if package.registry == "pypi" else _npm(package, scratch), Path(scratch))
        found = [path for path in Path(scratch).iterdir() if path.suffix in (".whl", ".tgz")]
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "no file"
            raise UserError(f"{package}: {package.registry} gave {names}, expected one {file.suffix} file")
        digest = sha256_of(found[0])
        if digest != package.sha256:
            raise UserError(
                f"{package}: the file that {package.registry} gave has SHA-256 {digest}, expected {package.sha256}: "
                "the package was changed, so it is not used"
            )
        os.replace(found[0], file)
    return file


def sha256_of(file: Path) -> str:
    """Hexadecimal digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a wheel or tarball that is `wanted`, in the archive's order."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if wanted(name):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tarball:
        for entry in tarball:
            if entry.isfile() and wanted(entry.name):
                stream = tarball.extractfile(entry)
                assert stream is not None  # only for entries that are no files
                yield entry.name, stream.read()


def member(archive: Path, name: str) -> bytes:
    """Content of one file of a wheel or tarball."""
    for _, content in members(archive, name.__eq__):
        return content
    raise UserError(f"{archive.name}: has no {name}")


def licence_text(package: Package, archive: Path) -> str:
    """What a package says of its licence: the texts in it, or its metadata where it holds none."""
    texts = [content.decode(errors="replace") for _, content in members(archive, _is_licence)]
    if not texts:
        texts = [content.decode(errors="replace") for _, content in members(archive, _is_metadata)]
    return f"{package} ({package.registry}): {package.licence}\n\n" + "\n\n".join(texts)


def _is_licence(name: str) -> bool:
    return _LICENCE.search(name) is not None


def _is_metadata(name: str) -> bool:
    return name.endswith(".dist-info/METADATA") or name == "package/package.json"


def _pip(package: Package, folder: str) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise UnreachableError(f"{package}: needs pip in this environment ({sys.executable} -m pip), found none")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    return [*command, "--disable-pip-version-check", "--retries", "2", "--dest", folder, str(package)]


def _npm(package: Package, folder: str) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UnreachableError(f"{package}: needs npm (it comes with Node.js), found none on PATH")
    return [npm, "pack", "--loglevel=error", "--fetch-retries=1", f"--pack-destination={folder}", str(package)]


def _run(package: Package, command: list[str], folder: Path) -> None:
    """Run a client in `folder`, where no project's own settings can change what it does."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"{package}: {package.registry} gave no answer in {_TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(npm )?error\b", line, re.IGNORECASE)] or lines[-1:]
        said = " ".join(errors[:2]) or f"exit status {done.returncode}"
        raise UnreachableError(
            f"{package}: not to be had from {package.registry} (is the package index reached?). It said: {said[:300]}"
        )
