"""Pictures of an imported model are prepared as transformers' own image processors prepare them, and the other way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_compete.convert.pictures import export_preprocessing, preprocessing_of
from llava_compete.errors import UserError
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.tower_config import PreprocessConfig, ResizeMode

SIZE = 28
SQUARE = {"height": SIZE, "width": SIZE}
EDGES = {"size": {"shortest_edge": SIZE}, "crop_size": SQUARE}


def photo(width: int, height: int) -> Image.Image:
    """Smooth, with an edge: what a filter and a margin show in."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 120 * np.sin(x / 7), 127 + 120 * np.cos(y / 5), np.where(x + y > width, 230, 20)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def pixels(processor: Any, image: Image.Image) -> np.ndarray:
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", [(60, 40), (40, 64), (28, 28), (21, 90)])
@pytest.mark.parametrize(
    "theirs",
    [CLIPImageProcessorPil(**EDGES), SiglipImageProcessorPil(size=SQUARE, resample=2), LlavaImageProcessorPil(**EDGES)],
    ids=["crop", "squash", "square"],
)
def test_pixels_are_those_of_pillow(theirs: Any, size: tuple[int, int]) -> None:
    ours = LlavaCompeteImageProcessor(**preprocessing_of(theirs, SIZE, "x").model_dump())
    np.testing.assert_allclose(pixels(ours, photo(*size)), pixels(theirs, photo(*size)), rtol=0, atol=1e-6)


def test_padded_pixels_differ_at_the_border_alone() -> None:
    """transformers pads and then resizes, which blurs the border; ours resizes and then pads."""
    theirs = LlavaImageProcessorPil(**EDGES, do_pad=True)
    ours = LlavaCompeteImageProcessor(**preprocessing_of(theirs, SIZE, "x").model_dump())
    assert ours.resize_mode == "pad"
    difference = np.abs(pixels(ours, photo(56, 28)) - pixels(theirs, photo(56, 28))).max(axis=(0, 2))
    rows = np.flatnonzero(difference > 0.02)  # 1/255 is 0.015
    assert set(rows) <= {5, 6, 7, 8, 19, 20, 21, 22}  # the picture lies in rows 7 to 20


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_the_way_back_is_the_same(mode: ResizeMode) -> None:
    there = PreprocessConfig(size=SIZE, resize_mode=mode, interpolation="bilinear", mean=(0.5, 0.4, 0.3))
    assert preprocessing_of(export_preprocessing(there, siglip=False), SIZE, "x") == there


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (CLIPImageProcessor(**EDGES, resample=1), "resample: found 1, expected 3"),
        (CLIPImageProcessor(**EDGES, do_normalize=False), "do_normalize: found false"),
        (CLIPImageProcessor(**EDGES, rescale_factor=1.0), "rescale_factor: found 1.0"),
        (SiglipImageProcessor(size={"height": 28, "width": 14}), r"size: found .* expected 28"),
        (LlavaImageProcessor(size={"shortest_edge": 28}, do_center_crop=False), "makes no square of a picture"),
    ],
)
def test_other_preparations_are_refused(processor: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preprocessing_of(processor, SIZE, "x")
