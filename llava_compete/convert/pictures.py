"""How pictures are prepared: transformers' image processors in our terms, and ours in theirs.

Pixels are of version 1, Pillow's, with which the published models were trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from llava_compete.errors import UserError
from llava_compete.vision.tower_config import Interpolation, PreprocessConfig, ResizeMode

_FILTERS: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_FILES = ("preprocessor_config.json", "processor_config.json")


def import_preprocessing(directory: Path, size: int) -> PreprocessConfig:
    """Of a directory with a preprocessor of transformers, for a tower of this image size.

    Raises:
        UserError: none there, or one whose steps have no equal here.
    """
    if not any((directory / name).is_file() for name in _FILES):
        raise UserError(f"{directory}: says nothing of how pictures are prepared, expected {' or '.join(_FILES)}")
    try:
        processor = AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: preprocessor: {str(error).splitlines()[0]}") from error
    return preprocessing_of(processor, size, str(directory))


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
        size=size, mean=mean, std=std, interpolation=_FILTERS[resample], resize_mode=mode, version=1
    )


def _resize_mode(processor: Any, size: int, source: str) -> ResizeMode:
    wanted = dict(processor.size)
    wanted = {key: value for key, value in wanted.items() if value is not None}
    sides = set(wanted.values())
    if sides != {size}:
        raise UserError(f"{source}: preprocessor: size: found {wanted}, expected {size}, the tower's image_size")
    if type(processor).__name__.startswith("LlavaNext"):
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


def export_preprocessing(preprocess: PreprocessConfig, siglip: bool) -> Any:
    """An image processor of transformers that prepares pictures as ours does."""
    resample = {name: number for number, name in _FILTERS.items()}[preprocess.interpolation]
    values = {"image_mean": list(preprocess.mean), "image_std": list(preprocess.std), "resample": resample}
    size = preprocess.size
    if preprocess.resize_mode == "squash":
        square = {"height": size, "width": size}
        if siglip:
            return SiglipImageProcessor(size=square, **values)
        return CLIPImageProcessor(size=square, do_center_crop=False, **values)
    edges = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    if preprocess.resize_mode == "crop":
        return CLIPImageProcessor(**edges, **values)
    return LlavaImageProcessor(**edges, do_pad=True, **values)
