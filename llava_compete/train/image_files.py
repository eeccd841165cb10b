"""The image files that a stage's rows name: looked for at the start, and known again when the stage goes on."""

from __future__ import annotations

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llava_compete.data.tables import SourceTable
from llava_compete.errors import UserError

# Rows of each source whose images are looked at, spread evenly over it.
SAMPLE = 64
# A parallel file system answers many questions at once, each in a millisecond.
_THREADS = 16
_AT_ONCE = 10_000


def check_images_are_there(table: SourceTable, *, may_skip: bool) -> None:
    """Refuse a wrong image folder now, and not after the model has been loaded and half an epoch trained.

    Args:
        may_skip: single images may be missing (`data.on_bad_image: skip`), but not all.

    Raises:
        UserError: naming the source, the first file that is missing and the folder.
    """
    files = sampled_files(table)
    missing = [path for path in files if not path.is_file()]
    if missing and (len(missing) == len(files) or not may_skip):
        raise UserError(
            f"data source {table.section.name!r}: {len(missing)} of {len(files)} sampled images are not there, "
            f"the first: {missing[0]}; images are named relative to image_folder, now {table.section.images}"
        )


def sampled_files(table: SourceTable) -> list[Path]:
    """Image files of up to `SAMPLE` rows, the same ones every time; embedded images are none."""
    rows = np.flatnonzero(table.rows.images_per_row())
    places = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows)), dtype=int))
    images = [image for row in rows[places] for image in table.rows.row(int(row))["images"]]
    return [table.section.images / image["path"] for image in images if image["path"] is not None]


def fingerprint(table: SourceTable) -> str:
    """A digest of the names and sizes of a source's image files, and of the bytes of the sampled ones."""
    digest = hashlib.sha256()
    folder = table.section.images
    with ThreadPoolExecutor(_THREADS) as pool:
        paths = table.rows.image_paths()
        while names := list(itertools.islice(paths, _AT_ONCE)):
            for name, size in zip(names, pool.map(_size, (folder / name for name in names)), strict=True):
                digest.update(f"{name}\0{size}\0".encode())
        for content in pool.map(_bytes, sampled_files(table)):
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # as good as any size: it is not there


def _bytes(path: Path) -> Any:
    try:
        return path.read_bytes()
    except OSError:
        return b""
