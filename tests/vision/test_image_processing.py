"""Pixels: open_clip's (version 1 to the bit), stable over save and load, and clear about bad images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw
from tiny import tiny_section
from transformers import AutoImageProcessor

from llava_compete.errors import UserError
from llava_compete.vision import resizing
from llava_compete.vision.image_decoder import BadImageError
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor
from llava_compete.vision.sources import resolve_tower
from llava_compete.vision.tower import normalise
from llava_compete.vision.tower_config import LATEST_PIXELS, PixelVersion, PreprocessConfig

SIZES = [(640, 480), (333, 500), (500, 490), (120, 90)]


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


def picture(width: int, height: int) -> Image.Image:
    """Smooth structure and some noise, as a photograph has."""
    generator = np.random.default_rng(width)
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + generator.integers(-12, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def chart(width: int, height: int) -> Image.Image:
    """Areas of one colour with sharp edges: rows of pixels that are alike."""
    generator = np.random.default_rng(height)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(300):
        left, top = generator.integers(0, (width, height)).tolist()
        across, down, *color = generator.integers(2, (60, 60, 256, 256, 256)).tolist()
        draw.rectangle((left, top, left + across, top + down), fill=tuple(color))
    return image


def levels(image: Image.Image, interpolation: str, resize_mode: str, version: int) -> np.ndarray:
    """By how many of 255 levels each value is away from open_clip's transform; from our version 1, which is equal to
    it, for the padding that open_clip has only for training sizes."""
    settings = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": interpolation}
    open_clips = {"squash": "squash", "crop": "shortest"}.get(resize_mode)
    if open_clips:
        cfg = PreprocessCfg(size=224, resize_mode=open_clips, **settings)
        expected = image_transform_v2(cfg, is_train=False)(image).numpy()
    else:
        expected = LlavaCompeteImageProcessor(224, resize_mode=resize_mode, **settings).pixels(image)
    found = LlavaCompeteImageProcessor(224, resize_mode=resize_mode, version=version, **settings).pixels(image)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    return np.abs(found.astype(int) - np.round(expected * 255).astype(int))


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (1500, 1000), (500, 490), (120, 90), (224, 224), (224, 90)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["squash", "crop", "pad"])
def test_version_3_is_within_a_level_of_open_clip(size: tuple[int, int], interpolation: str, resize_mode: str) -> None:
    for image in (picture(*size), chart(*size)):
        assert levels(image, interpolation, resize_mode, version=3).max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["squash", "crop", "pad"])
def test_version_2_is_within_two_levels_and_nearly_all_within_one(interpolation: str, resize_mode: str) -> None:
    found = [levels(make(*size), interpolation, resize_mode, 2) for make in (picture, chart) for size in SIZES]
    assert max(each.max() for each in found) <= 2
    assert np.mean([(each > 1).mean() for each in found]) < 1e-5


def test_version_2_is_two_levels_away_in_a_chart() -> None:
    """Why version 3 is there: torch's weights of 16 bits, on rows that are alike."""
    assert max(levels(chart(640, height), "bicubic", "squash", 2).max() for height in range(470, 490)) == 2


def test_pixels_are_the_same_with_and_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(100, 70)
    # Pillow lends its fours since 11.2.1; of an older one everything is a copy.
    assert resizing.pixels_of(image).shape == (1, 4 if hasattr(image, "__arrow_c_array__") else 3, 70, 100)
    processors = [
        LlavaCompeteImageProcessor(48, resize_mode=mode, version=version)
        for mode in ("pad", "crop", "squash")
        for version in (2, 3)
    ]
    lent = [processor.pixels(image) for processor in processors]
    monkeypatch.setattr(resizing, "_arrow", lambda: None)  # without pyarrow, or of an image in several blocks
    assert resizing.pixels_of(image).shape == (1, 3, 70, 100)
    for processor, expected in zip(processors, lent, strict=True):
        np.testing.assert_array_equal(processor.pixels(image), expected)


def test_an_image_in_several_blocks_is_copied() -> None:
    image = Image.new("RGB", (3000, 2000), (1, 2, 3))
    assert resizing.pixels_of(image).shape == (1, 3, 2000, 3000)
    assert LlavaCompeteImageProcessor(8, version=2).pixels(image)[:, 4, 4].tolist() == [1, 2, 3]


@pytest.mark.parametrize("version", [2, 3])
def test_a_model_normalises_to_what_version_1_hands_over(version: PixelVersion) -> None:
    preprocess = PreprocessConfig(size=60, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), version=version)
    image = picture(60, 60)  # nothing to resize
    new = LlavaCompeteImageProcessor(**preprocess.model_dump())(image, return_tensors="pt")["pixel_values"]
    old = LlavaCompeteImageProcessor(**preprocess.model_dump() | {"version": 1})(image, return_tensors="pt")
    torch.testing.assert_close(normalise(new, preprocess), old["pixel_values"], rtol=0, atol=1e-6)


def test_training_evaluation_and_serving_hand_over_the_same_bytes(tmp_path: Path) -> None:
    processor = LlavaCompeteImageProcessor(48, resize_mode="pad", version=2)
    path = tmp_path / "picture.png"
    picture(100, 70).save(path)
    ways = [path, str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))]
    first, *others = (processor(way, return_tensors="pt")["pixel_values"] for way in ways)
    assert first.dtype == torch.uint8
    assert all(torch.equal(first, other) for other in others)


def test_old_checkpoints_keep_pillows_pixels(tmp_path: Path) -> None:
    LlavaCompeteImageProcessor(48, version=2).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    saved = json.loads(file.read_text())
    assert LlavaCompeteImageProcessor.from_pretrained(tmp_path).version == saved.pop("version") == 2
    file.write_text(json.dumps(saved))
    old = LlavaCompeteImageProcessor.from_pretrained(tmp_path)
    assert old.pixels(picture(90, 70)).dtype == np.float32
    assert PreprocessConfig(size=48).version == 1


def test_new_towers_say_the_latest_version_and_a_yaml_may_choose() -> None:
    assert resolve_tower(tiny_section().vision_tower).preprocess.version == LATEST_PIXELS
    chosen = tiny_section(preprocess={"version": 1}).vision_tower
    assert resolve_tower(chosen).preprocess.version == 1


def test_pad_keeps_the_whole_image_on_the_mean_colour() -> None:
    processor = LlavaCompeteImageProcessor(30, mean=(0.5, 0.25, 0.75), std=(1, 1, 1), resize_mode="pad")
    pixels = processor.pixels(Image.new("RGB", (30, 10), (255, 255, 255)))
    np.testing.assert_allclose(pixels[:, 0, 0], 0, atol=1 / 255)
    np.testing.assert_allclose(pixels[:, 15, 15], 1 - np.array([0.5, 0.25, 0.75]), atol=1e-6)


@pytest.mark.parametrize("version", [1, LATEST_PIXELS])
def test_thin_pictures_are_named_where_their_middle_is_cut_out(version: PixelVersion) -> None:
    """Scaled by their one pixel, they would become gigabytes."""
    thin = Image.new("RGB", (40_000, 1))
    with pytest.raises(BadImageError, match="image of 40000x1 pixels: so thin"):
        LlavaCompeteImageProcessor(56, version=version, resize_mode="crop").pixels(thin)
    assert LlavaCompeteImageProcessor(56, version=version, resize_mode="pad").pixels(thin).shape == (3, 56, 56)


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
