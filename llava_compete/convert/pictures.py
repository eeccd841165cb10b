"""How pictures are prepared: transformers' image processors in our terms, and ours in theirs.

Pixels are of version 1, Pillow's, with which the published models were trained; tiles are made of those of version 2,
torch's, as transformers' processor of LLaVA-NeXT makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    SiglipImageProcessor,
)

from llava_compete.errors import UserError
from llava_compete.vision.tiles import Grid
from llava_compete.vision.tower_config import Interpolation, PreprocessConfig, ResizeMode

_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_FILES = ("preprocessor_config.json", "processor_config.json")


def import_preprocessing(directory: Path, size: int) -> tuple[PreprocessConfig, tuple[Grid, ...] | None]:
    """Of a directory with a preprocessor of transformers, for a tower of this image size; and the grids of its tiles.

    Raises:
        UserError: none there, or one whose steps have no equal here.
    """
    if not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory}: says nothing of how pictures are prepared, expected {' or '.join(_FILES)}")
    try:
        processor = AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: preprocessor: {str(error).splitlines()[0]}") from error
    preprocess = preprocessing_of(processor, size, str(directory))
    if not is_tiled(processor):
        return preprocess, None
    return preprocess, grids_of(processor.image_grid_pinpoints, size, f"{directory}: preprocessor")


def is_tiled(processor: Any) -> bool:
    """Whether it cuts pictures into tiles, as LLaVA-NeXT's do."""
    return type(processor).__name__.startswith("LlavaNext")


def grids_of(pinpoints: Any, size: int, source: str) -> tuple[Grid, ...]:
    """LLaVA-NeXT's `image_grid_pinpoints`, [height, width] in pixels, as [rows, columns] of tiles."""
    grids = []
    for height, width in pinpoints:
        if height % size or width % size or not height or not width:
            raise UserError(
                f"{source}: image_grid_pinpoints: found [{height}, {width}], expected multiples of {size}, a tile"
            )
        grids.append((height // size, width // size))
    if len(set(grids)) < len(grids) or not grids:
        raise UserError(f"{source}: image_grid_pinpoints: found {pinpoints}, expected different sizes, at least one")
    return tuple(grids)


def preprocessing_of(processor: Any, size: int, source: str) -> PreprocessConfig:
    """Of an image processor of transformers."""
    mode = _resize_mode(processor, size, source)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if getattr(processor, key, True) is False:
            raise UserError(f"{source}: preprocessor: {key}: found false, expected true")
    factor = getattr(processor, "rescale_factor", 1 / 255)
    if abs(factor - 1 / 255) > 1e-9:
        raise UserError(f"{source}: preprocessor: rescale_factor: found {factor}, expected 1/255")
    resample = int(processor.resample)
    if resample not in _FILTERS:
        raise UserError(f"{source}: preprocessor: resample: found {resample}, expected 3 (bicubic) or 2 (bilinear)")
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return PreprocessConfig(
        size=size,
        mean=mean,
        std=std,
        interpolation=_FILTERS[resample],
        resize_mode=mode,
        version=2 if is_tiled(processor) else 1,
    )


def _resize_mode(processor: Any, size: int, source: str) -> ResizeMode:
    wanted = dict(processor.size)
    wanted = {key: value for key, value in wanted.items() if value is not None}
    sides = set(wanted.values())
    if sides != {size}:
        raise UserError(f"{source}: preprocessor: size: found {wanted}, expected {size}, the tower's image_size")
    if is_tiled(processor):
        crop = {key: value for key, value in dict(processor.crop_size or {}).items() if value is not None}
        if set(crop.values()) - {size}:
            raise UserError(f"{source}: preprocessor: crop_size: found {crop}, expected {size}, the side of a tile")
        return "squash"  # the picture as a whole, beside whose features those of its tiles stand
    if getattr(processor, "do_pad", False) and type(processor).__name__.startswith("LlavaImage"):
        return "pad"
    if set(wanted) == {"height", "width"}:
        return "squash"
    if set(wanted) == {"shortest_edge"} and getattr(processor, "do_center_crop", False):
        return "crop"
    raise UserError(
        f"{source}: preprocessor: {type(processor).__name__} with size {wanted} makes no square of a picture in a way "
        "known here: padded to a square, squashed to a height and width, or its shortest edge scaled and its centre cut"
    )


def pinpoints_of(grids: tuple[Grid, ...], size: int) -> list[list[int]]:
    """`grids_of` the other way."""
    return [[rows * size, columns * size] for rows, columns in grids]


def export_preprocessing(preprocess: PreprocessConfig, siglip: bool, tiles: tuple[Grid, ...] | None = None) -> Any:
    """An image processor of transformers that prepares pictures as ours does; `tiles`: the grids they are cut into."""
    resample = {name: number for number, name in _FILTERS.items()}[preprocess.interpolation]
    values = {"image_mean": list(preprocess.mean), "image_std": list(preprocess.std), "resample": resample}
    size = preprocess.size
    if tiles is not None:
        return LlavaNextImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=pinpoints_of(tiles, size),
            **values,
        )
    if preprocess.resize_mode == "squash":
        square = {"height": size, "width": size}
        if siglip:
            return SiglipImageProcessor(size=square, **values)
        return CLIPImageProcessor(size=square, do_center_crop=False, **values)
    edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if preprocess.resize_mode == "crop":
        return CLIPImageProcessor(**edges, **values)
    return LlavaImageProcessor(**edges, do_pad=True, **values)
