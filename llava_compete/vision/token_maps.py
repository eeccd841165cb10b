"""Which part of a picture each token shows: maps of cells, and where their edges are in the picture's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_compete.vision.image_decoder import Size
from llava_compete.vision.tiles import Box, Tiling


class TokenMap(NamedTuple):
    """cells: int64 [rows, columns], the token that shows each cell, or -1; box: the map's edges in pixels."""

    cells: np.ndarray
    box: Box


def tile_cells(rows: int, columns: int, num_tokens: int) -> np.ndarray:
    """int64 [rows, columns]: the tokens of one square in reading order, behind a class token if it has one."""
    return num_tokens - rows * columns + np.arange(rows * columns).reshape(rows, columns)


def token_maps(whole: TokenMap, tiling: Tiling | None, picture: Size) -> list[TokenMap]:
    """Of a picture: the map of its whole, and with tiles that of its grid of tiles."""
    return [whole] if tiling is None else [whole, TokenMap(tiling.places(picture), tiling.box(picture))]


def edges(box: Box, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of the columns and of the rows of cells, in the picture's pixels."""
    return np.linspace(box[0], box[2], shape[1] + 1), np.linspace(box[1], box[3], shape[0] + 1)


def on_picture(box: Box, shape: tuple[int, ...], picture: Size) -> np.ndarray:
    """bool [R, C]: which cells have something of the picture in them, and not of its borders alone."""
    across, down = edges(box, shape)
    in_width = (across[1:] > 0.5) & (across[:-1] < picture[1] - 0.5)
    in_height = (down[1:] > 0.5) & (down[:-1] < picture[0] - 0.5)
    return in_height[:, None] & in_width


def boxes_of_tokens(maps: Sequence[TokenMap], picture: Size, boxes: Sequence[Box]) -> dict[int, list[int]]:
    """Token -> the numbers of the boxes whose centre it shows; of every token that shows something of the picture."""
    found: dict[int, list[int]] = {}
    for cells, box in maps:
        seen = np.where(on_picture(box, cells.shape, picture), cells, -1)
        found |= {int(token): [] for token in seen.reshape(-1) if token >= 0}
        across, down = edges(box, cells.shape)
        for number, (left, top, right, bottom) in enumerate(boxes):
            column = int(np.searchsorted(across, (left + right) / 2, side="right")) - 1
            row = int(np.searchsorted(down, (top + bottom) / 2, side="right")) - 1
            if 0 <= row < cells.shape[0] and 0 <= column < cells.shape[1] and seen[row, column] >= 0:
                found[int(seen[row, column])].append(number)
    return found
