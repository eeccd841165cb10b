"""Which expert answered which place of a picture: the cells of tower, projector and language model over the original.

A cell is a token's place. Tower, projector and language model have as many as the tower's map has places, divided by
the projector's pooling; of a picture in tiles the cells are those of its grid of tiles (the whole picture, which the
model sees beside them, is left out). With several scales (S²) a tower's block is shown at the first. Suffixes: T
tokens, K chosen, R rows and C columns of cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_compete.vision.image_decoder import Size
from llava_compete.vision.naflex import NativeSizes
from llava_compete.vision.tiles import Box
from llava_compete.vision.token_maps import edges, tile_cells
from llava_compete.vision.token_maps import on_picture as cells_on_picture


class ShownPicture(NamedTuple):
    """A picture as it was given, and where in its pixels the edges of the map of cells are."""

    picture: Image.Image
    box: Box


def shown_pictures(processor: Any, pictures: Sequence[Image.Image]) -> list[ShownPicture]:
    """Pictures (upright, RGB) with the places of their maps."""
    tiling = processor.tiling
    boxes = processor.image_processor.box if tiling is None else tiling.box
    return [ShownPicture(picture, boxes((picture.height, picture.width))) for picture in pictures]


def picture_maps(
    model: Any, experts: Mapping[str, np.ndarray], places_T: np.ndarray, pictures: Sequence[ShownPicture]
) -> dict[str, list[np.ndarray]]:
    """By layer and picture the experts of each cell, int64 [R, C, K], best first; -1 where none looks at the picture.

    Args:
        experts: of one row, by layer, [T, K].
        places_T: where in the row's text the pictures' tokens stand.
    """
    sizes = [(shown.picture.height, shown.picture.width) for shown in pictures]
    cells = {part: token_cells(model, part, sizes) for part in {name.split(".")[0] for name in experts}}
    maps: dict[str, list[np.ndarray]] = {}
    for name, experts_TK in experts.items():
        part = name.split(".")[0]
        of_pictures_TK = experts_TK[places_T] if part == "language" else experts_TK
        maps[name] = []
        for cells_RC, shown in zip(cells[part], pictures, strict=True):
            seen_RC = (cells_RC >= 0) & on_picture(shown, cells_RC.shape)
            maps[name].append(np.where(seen_RC[..., None], of_pictures_TK[cells_RC], -1))
    return maps


def token_cells(model: Any, part: str, sizes: Sequence[Size]) -> list[np.ndarray]:
    """For each picture of these heights and widths int64 [R, C]: which of the part's tokens (of the language model:
    which of the pictures' tokens) looks at each cell, or -1."""
    tower, tiling = model.model.vision_tower, model.model.tiling
    if isinstance(tiling, NativeSizes):
        return tiling.token_cells(sizes, part == "vision", tower.kind.num_prefix_tokens)
    rows, columns = tower.grid
    if part == "vision":
        per_tile = tower.tokens_per_tile
    else:
        rows, columns = rows // model.config.projector.pool, columns // model.config.projector.pool
        per_tile = model.config.num_image_tokens
    tile_RC = tile_cells(rows, columns, per_tile)
    if tiling is None:
        return [tile_RC + number * per_tile for number in range(len(sizes))]
    found, start = [], 0
    for size in sizes:
        if part == "language":
            places_RC = tiling.places(size)
            found.append(np.where(places_RC >= 0, start + places_RC, -1))
            start += tiling.num_tokens(size)
            continue
        down, across = tiling.grid(size)
        tiles = start + 1 + np.arange(down * across).reshape(down, 1, across, 1)
        cells = tiles * per_tile + tile_RC[None, :, None, :]
        found.append(cells.reshape(down * rows, across * columns))
        start += tiling.num_tiles(size)
    return found


def on_picture(shown: ShownPicture, shape: tuple[int, ...]) -> np.ndarray:
    """bool [R, C]: which cells have something of the picture in them, and not of its borders alone."""
    return cells_on_picture(shown.box, shape, (shown.picture.height, shown.picture.width))


def cut_cell(shown: ShownPicture, shape: tuple[int, ...], cell: int) -> Image.Image:
    """What of the picture is in a cell, counted in reading order over R x C."""
    across, down = edges(shown.box, shape)
    row, column = divmod(cell, shape[1])
    width, height = shown.picture.size
    left, right = (round(min(max(edge, 0), width)) for edge in across[column : column + 2])
    top, bottom = (round(min(max(edge, 0), height)) for edge in down[row : row + 2])
    # Of a picture smaller than its map a cell may be less than a pixel.
    left, top = min(left, width - 1), min(top, height - 1)
    return shown.picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
