"""Pictures of any resolution in tiles, as in LLaVA-NeXT: the whole picture at the tower's size, then a grid of tiles.

Of the allowed grids the one that fits best is chosen; the picture is resized into it with its own proportions and black
borders, and cut. Features of the borders are dropped, and a learned newline ends each row of those that stay. All this
follows from a picture's height and width alone, so that tokens can be counted without decoding it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from llava_compete.vision.image_decoder import BadImageError, Size, full_size
from llava_compete.vision.resizing import resized

Grid = tuple[int, int]  # rows and columns of tiles
Box = tuple[float, float, float, float]  # left, top, right, bottom
# Of LLaVA-NeXT's published checkpoints.
LLAVA_NEXT_GRIDS: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_NEWLINE = -1


class Layout(NamedTuple):
    """Where the embeddings of a batch of pictures come from.

    tiles: of each picture, the whole one included; lengths: embeddings of each.
    sources, places: int64 [K], row `sources[k]` of the projected features [tiles * P, H] becomes row `places[k]` of the
        embeddings [sum of lengths, H]; no row comes twice. All other rows are newlines.
    """

    tiles: list[int]
    lengths: list[int]
    sources: np.ndarray
    places: np.ndarray


class _Kept(NamedTuple):
    """Rows and columns of the grid's features that show the picture: first and last (exclusive)."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Tiling:
    """size: side of a tile in pixels; side: of its square of embeddings; grids: those allowed, the first wins a tie."""

    size: int
    side: int
    grids: tuple[Grid, ...]
    setting = "model.vision_tower.tiles.max"

    def grid(self, picture: Size) -> Grid:
        """The grid in which most of the picture's pixels show; of equals the smallest.

        Raises:
            BadImageError: a picture so long and thin that no pixel of it is left.
        """
        return _grid(picture, self.size, self.grids)

    def inside(self, picture: Size) -> Size:
        """Height and width that a picture has in its grid."""
        rows, columns = self.grid(picture)
        return _placed(picture, (rows * self.size, columns * self.size))[:2]

    def num_tiles(self, picture: Size) -> int:
        """Tiles of a picture, the whole one included."""
        rows, columns = self.grid(picture)
        return 1 + rows * columns

    def num_tokens(self, picture: Size) -> int:
        """Embeddings of a picture: its whole, then each row of its features with a newline."""
        kept = _kept(picture, self)
        return self.side**2 + (kept.bottom - kept.top) * (kept.right - kept.left + 1)

    @property
    def largest(self) -> Size:
        """The picture of most tokens: one that fills its grid."""
        # Counted without `num_tokens`, which would try every grid for each of them.
        rows, columns = max(self.grids, key=lambda grid: grid[0] * (grid[1] * self.side + 1))
        return rows * self.size, columns * self.size

    def box(self, picture: Size) -> Box:
        """Where the edges of the grid of tiles are in the picture's own pixels: beyond its edges by the borders."""
        rows, columns = self.grid(picture)
        target = rows * self.size, columns * self.size
        height, width, top, left = _placed(picture, target)
        across, down = picture[1] / width, picture[0] / height
        return -left * across, -top * down, (target[1] - left) * across, (target[0] - top) * down

    def places(self, picture: Size) -> np.ndarray:
        """int64 [rows, columns] over the grid's features: which of the picture's embeddings each is, or -1."""
        kept = _kept(picture, self)
        rows, columns = self.grid(picture)
        found = np.full((rows * self.side, columns * self.side), -1)
        height, width = kept.bottom - kept.top, kept.right - kept.left
        order = self.side**2 + np.arange(height * (width + 1)).reshape(height, width + 1)
        found[kept.top : kept.bottom, kept.left : kept.right] = order[:, :-1]  # a newline ends each row
        return found

    def __str__(self) -> str:
        height, width = self.largest
        return f"{height // self.size} x {width // self.size} tiles"

    def layout(self, pictures: Sequence[Size]) -> Layout:
        """Of a batch, in reading order."""
        tiles = [self.num_tiles(picture) for picture in pictures]
        orders, start = [], 0
        for picture, count in zip(pictures, tiles, strict=True):
            order = _order(picture, self)
            orders.append(np.where(order == _NEWLINE, _NEWLINE, order + start))
            start += count * self.side**2
        joined = np.concatenate(orders) if orders else np.zeros(0, np.int64)
        (places,) = np.nonzero(joined != _NEWLINE)
        return Layout(tiles, [len(order) for order in orders], joined[places], places)


def tile_pixels(image: Image.Image, tiling: Tiling, interpolation: Literal["bicubic", "bilinear"]) -> np.ndarray:
    """An RGB picture's grid, cut in reading order: uint8 [rows * columns, 3, size, size]."""
    picture = full_size(image)
    rows, columns = tiling.grid(picture)
    size, target = tiling.size, (rows * tiling.size, columns * tiling.size)
    height, width, top, left = _placed(picture, target)
    canvas = np.zeros((3, *target), np.uint8)
    canvas[:, top : top + height, left : left + width] = resized(image, height, width, interpolation).numpy()
    return canvas.reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4).reshape(-1, 3, size, size)


def _placed(picture: Size, target: Size) -> tuple[int, int, int, int]:
    """Height and width of the picture once it fits into `target`, and the top and left of its place there."""
    by_width, by_height = target[1] / picture[1], target[0] / picture[0]
    if by_width < by_height:
        height, width = min(math.ceil(picture[0] * by_width), target[0]), target[1]
    else:
        height, width = target[0], min(math.ceil(picture[1] * by_height), target[1])
    return height, width, (target[0] - height) // 2, (target[1] - width) // 2


@lru_cache(maxsize=65536)
def _grid(picture: Size, size: int, grids: tuple[Grid, ...]) -> Grid:
    best = select_best_resolution(picture, [(rows * size, columns * size) for rows, columns in grids])
    height, width = picture
    scale = min(best[0] / height, best[1] / width)
    if int(height * scale) < 1 or int(width * scale) < 1:
        text = f"image of {width}x{height} pixels: so thin that its tiles would show nothing of it"
        raise BadImageError("image_too_small", text)
    return best[0] // size, best[1] // size


@lru_cache(maxsize=65536)
def _kept(picture: Size, tiling: Tiling) -> _Kept:
    rows, columns = (count * tiling.side for count in tiling.grid(picture))
    height, width = picture
    # LLaVA-NeXT's arithmetic, rounding included: what `unpad_image` of transformers cuts.
    if width / height > columns / rows:
        border, of_width = (rows - int(round(height * (columns / width), 7))) // 2, 0
    else:
        border, of_width = 0, (columns - int(round(width * (rows / height), 7))) // 2
    return _Kept(border, rows - border, of_width, columns - of_width)


@lru_cache(maxsize=4096)
def _order(picture: Size, tiling: Tiling) -> np.ndarray:
    """Of one picture: for each embedding its place among the features of its tiles, or `_NEWLINE`."""
    side, kept = tiling.side, _kept(picture, tiling)
    rows, columns = tiling.grid(picture)
    places = side**2 + np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
    grid = places.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    grid = grid[kept.top : kept.bottom, kept.left : kept.right]
    with_newlines = np.pad(grid, ((0, 0), (0, 1)), constant_values=_NEWLINE)
    return np.concatenate([np.arange(side**2), with_newlines.reshape(-1)])
