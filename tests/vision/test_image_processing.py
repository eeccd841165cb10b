"""Pixels: bit-equal to open_clip's transform, stable over save and load, and clear about bad images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import AutoImageProcessor

from llava_compete.errors import UserError
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 48), (33, 71), (50, 50), (20, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("ours", "open_clips"), [("squash", "squash"), ("crop", "shortest")])
def test_pixels_are_open_clips(size: tuple[int, int], interpolation: str, ours: str, open_clips: str) -> None:
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    reference = image_transform_v2(
        PreprocessCfg(size=37, mean=mean, std=std, interpolation=interpolation, resize_mode=open_clips), is_train=False
    )
    processor = LlavaCompeteImageProcessor(37, mean, std, interpolation, ours)
    image = photo(*size)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], reference(image))


def test_pad_keeps_the_whole_image_on_the_mean_colour() -> None:
    processor = LlavaCompeteImageProcessor(30, mean=(0.5, 0.25, 0.75), std=(1, 1, 1), resize_mode="pad")
    pixels = processor.pixels(Image.new("RGB", (30, 10), (255, 255, 255)))
    np.testing.assert_allclose(pixels[:, 0, 0], 0, atol=1 / 255)
    np.testing.assert_allclose(pixels[:, 15, 15], 1 - np.array([0.5, 0.25, 0.75]), atol=1e-6)


def test_save_and_load_give_bit_equal_pixels(tmp_path: Path) -> None:
    processor = LlavaCompeteImageProcessor(45, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "pad")
    processor.save_pretrained(tmp_path)
    again = LlavaCompeteImageProcessor.from_pretrained(tmp_path)
    image = photo(70, 41)
    assert np.array_equal(processor.pixels(image), again.pixels(image))
    auto = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(auto) is LlavaCompeteImageProcessor


def test_modes_arrays_and_nesting() -> None:
    processor = LlavaCompeteImageProcessor(8)
    array = np.asarray(photo(9, 9))
    images = [[photo(9, 9)], [photo(9, 9).convert("L"), array], torch.from_numpy(array.copy()).permute(2, 0, 1)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 8, 8)
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[0], pixels[3])


@pytest.mark.parametrize("bad", [Image.new("RGB", (0, 5)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_bad_images_are_named(bad: object) -> None:
    with pytest.raises(UserError, match=r"image.*(0x5|\(4, 4)"):
        LlavaCompeteImageProcessor(8)(bad)
