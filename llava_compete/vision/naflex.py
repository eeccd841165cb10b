"""Pictures at their own proportions, as SigLIP 2's NaFlex towers take them: no square, no tiles, a budget of patches.

A picture is resized to the most patches within the budget that keep its proportions, and cut into them; they are its
rows of pixel_values. All this follows from its height and width alone, as for `tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from llava_compete.vision.image_decoder import Size, full_size
from llava_compete.vision.resizing import resized
from llava_compete.vision.tiles import Box, Grid, Tiling


class NaFlexLayout(NamedTuple):
    """A batch of pictures, padded to the longest: n pictures of at most L patches, T in all.

    tiles: patches of each picture; lengths: embeddings of each; grids: rows and columns of patches of each.
    places: int64 [T], where in [n * L] each row of pixel_values goes.
    sources: int64 [T], the features in [n * L] in the order of the embeddings, those that are pooled side by side.
    """

    tiles: list[int]
    lengths: list[int]
    grids: list[Grid]
    places: np.ndarray
    sources: np.ndarray


@dataclass(frozen=True)
class NativeSizes:
    """patch: side of a patch in pixels; pool: patches of pool x pool places become one embedding; max_patches: of a
    picture."""

    patch: int
    pool: int
    max_patches: int
    setting = "model.vision_tower.naflex.max_patches"

    def grid(self, picture: Size) -> Grid:
        """Rows and columns of patches, multiples of `pool`, at most `max_patches` in all."""
        return _grid(picture, self)

    def inside(self, picture: Size) -> Size:
        """Height and width that a picture is resized to."""
        rows, columns = self.grid(picture)
        return rows * self.patch, columns * self.patch

    def num_tiles(self, picture: Size) -> int:
        """Patches of a picture: its rows of pixel_values."""
        rows, columns = self.grid(picture)
        return rows * columns

    def num_tokens(self, picture: Size) -> int:
        """Embeddings of a picture."""
        return self.num_tiles(picture) // self.pool**2

    @property
    def largest(self) -> Size:
        """A picture of most tokens: one row of as many patches as the budget has."""
        side = self.patch * self.pool
        return side, side * (self.max_patches // self.pool**2)

    def box(self, picture: Size) -> Box:
        """Where the edges of the grid of patches are in the picture's own pixels: at its own."""
        return 0.0, 0.0, float(picture[1]), float(picture[0])

    def token_cells(self, pictures: Sequence[Size], in_tower: bool, num_prefix: int) -> list[np.ndarray]:
        """int64 [rows, columns] of each picture: which token is at each place, of the tower's padded batch with its
        prefix tokens, or of the pictures' embeddings."""
        grids = [self.grid(picture) for picture in pictures]
        if in_tower:
            longest = num_prefix + max(rows * columns for rows, columns in grids)
            starts = [num_prefix + number * longest for number in range(len(grids))]
        else:
            grids = [(rows // self.pool, columns // self.pool) for rows, columns in grids]
            starts = [0, *accumulate(rows * columns for rows, columns in grids)][:-1]
        return [start + np.arange(grid[0] * grid[1]).reshape(grid) for start, grid in zip(starts, grids, strict=True)]

    def __str__(self) -> str:
        return f"{self.max_patches} patches"

    def layout(self, pictures: Sequence[Size]) -> NaFlexLayout:
        """Of a batch, in reading order."""
        return naflex_layout([self.grid(picture) for picture in pictures], self.pool)


def naflex_layout(grids: list[Grid], pool: int) -> NaFlexLayout:
    """Of pictures of these grids."""
    tiles = [rows * columns for rows, columns in grids]
    starts = np.arange(len(grids)) * max(tiles)
    places = [start + np.arange(count) for start, count in zip(starts, tiles, strict=True)]
    sources = [start + _pooled_order(grid, pool) for start, grid in zip(starts, grids, strict=True)]
    lengths = [count // pool**2 for count in tiles]
    return NaFlexLayout(tiles, lengths, grids, np.concatenate(places), np.concatenate(sources))


def patch_pixels(image: Image.Image, sizes: NativeSizes, interpolation: Literal["bicubic", "bilinear"]) -> np.ndarray:
    """An RGB picture's patches in reading order: uint8 [rows * columns, 3, patch, patch]."""
    rows, columns = sizes.grid(full_size(image))
    side = sizes.patch
    pixels_3HW = resized(image, rows * side, columns * side, interpolation).numpy()
    return pixels_3HW.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)


@lru_cache(maxsize=4096)
def _pooled_order(grid: Grid, pool: int) -> np.ndarray:
    """The patches of a grid, those of one embedding side by side, embeddings in reading order."""
    rows, columns = grid
    numbers = np.arange(rows * columns).reshape(rows // pool, pool, columns // pool, pool)
    return numbers.transpose(0, 2, 1, 3).reshape(-1)


@lru_cache(maxsize=65536)
def _grid(picture: Size, sizes: NativeSizes) -> Grid:
    # Only processors of such towers pay for this import, torchvision's.
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    side = sizes.patch * sizes.pool
    height, width = get_image_size_for_max_num_patches(*picture, side, sizes.max_patches // sizes.pool**2)
    return height // sizes.patch, width // sizes.patch


# What depends on a picture's size: its pixels, rows of pixel_values and embeddings.
SizedPictures = Tiling | NativeSizes
