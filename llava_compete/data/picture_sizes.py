"""Heights and widths of all pictures of a source, from the files' headers: what their tokens are counted by.

Read once and remembered beside the source's tables. A picture whose header cannot be read counts as empty here; it is
named where the row is read.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llava_compete.data.tables import SourceTable
from llava_compete.files import write_bytes
from llava_compete.vision.image_decoder import BadImageError, image_size

_THREADS = 16  # reading headers waits for the disk


def picture_sizes(table: SourceTable, folder: Path) -> np.ndarray:
    """int32 [pictures, 2]: height and width of each picture of a source, in the order of its rows; 0 where unreadable.

    folder: of the converted tables.
    """
    key = hashlib.sha256(f"{table.digest}\0{table.section.images}".encode()).hexdigest()[:32]
    path = folder / f"{key}-sizes.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r")
    references = (image for row in table.rows for image in row["images"])
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda image: _size(table.section.images, image), references))
    sizes = np.array(found, np.int32).reshape(-1, 2)
    content = io.BytesIO()
    np.save(content, sizes)
    write_bytes(path, content.getvalue())
    return sizes


def _size(folder: Path, image: dict[str, Any]) -> tuple[int, int]:
    try:
        return image_size(image["bytes"] if image["path"] is None else folder / image["path"])
    except BadImageError:
        return 0, 0
