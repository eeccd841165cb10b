"""JPEG draft mode: Pillow's own drafts, counted by their headers, and one picture everywhere a file comes in."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naflex_kit import TOWER
from PIL import ExifTags, Image
from tiny import tiny_model

from llava_compete.config import parse_config
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import build_datasets
from llava_compete.evaluation.answerer import Answerer, Prompt
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.evaluation.routing_data import Rows, encode_row
from llava_compete.vision.image_decoder import full_size, image_size, open_image
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor

SIZE = 28
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + generator.integers(-6, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(buffer, "JPEG", exif=exif, quality=90, **options)
    return buffer.getvalue()


def wanted(height: int, width: int) -> Any:
    return lambda size: (height, width)


@pytest.mark.parametrize(
    ("least", "scale"), [((15, 20), 8), ((16, 20), 4), ((28, 28), 4), ((50, 80), 2), ((62, 83), 2), ((63, 80), 1)]
)
def test_half_a_quarter_or_an_eighth_where_twice_the_size_is_left(least: tuple[int, int], scale: int) -> None:
    content = jpeg(photograph(333, 250))
    found = open_image(content, wanted=wanted(*least))
    expected = Image.open(io.BytesIO(content))
    expected.draft(None, (333 // scale, 250 // scale))
    assert found.size == (round(333 / scale), round(250 / scale))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected)[: found.height, : found.width])
    assert full_size(found) == image_size(content) == (250, 333)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_picture(orientation: int) -> None:
    content = jpeg(photograph(400, 200), orientation)
    size = (400, 200) if orientation in (6, 8) else (200, 400)
    # Of the upright height and width one alone would allow an eighth.
    found = open_image(content, wanted=lambda given: (size[0] // 4, 10) if given == size else None)
    assert full_size(found) == image_size(content) == size
    assert (found.height, found.width) == (size[0] // 2, size[1] // 2)
    whole = np.asarray(open_image(content).reduce(2), int)
    assert np.abs(np.asarray(found, int) - whole).mean() < 3


def test_other_files_small_pictures_and_parts_of_drafts_are_whole() -> None:
    image, buffer = photograph(300, 200), io.BytesIO()
    image.save(buffer, "PNG")
    assert open_image(buffer.getvalue(), wanted=wanted(10, 10)).size == (300, 200)
    assert open_image(jpeg(image), wanted=wanted(200, 300)).size == (300, 200)
    draft = open_image(jpeg(image), wanted=wanted(20, 20))
    assert full_size(draft) == (200, 300)
    assert full_size(draft.crop((0, 0, 10, 12))) == (12, 10)
    grey = open_image(jpeg(image.convert("L")), wanted=wanted(20, 20))
    cmyk = open_image(jpeg(image.convert("CMYK")), wanted=wanted(20, 20))
    assert (grey.size, cmyk.size, grey.mode, cmyk.mode) == ((75, 50), (75, 50), "RGB", "RGB")


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("resize_mode", ["pad", "squash", "crop"])
def test_a_draft_shows_nearly_the_same(version: int, resize_mode: str) -> None:
    settings: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1), "resize_mode": resize_mode, "version": version}
    content = jpeg(photograph(1001, 775))
    whole, draft = (
        LlavaCompeteImageProcessor(SIZE, jpeg_draft=draft, **settings)([content], return_tensors="pt")["pixel_values"]
        for draft in (False, True)
    )
    assert not torch.equal(whole, draft)
    scale = 255 if version == 1 else 1
    assert (whole.float() - draft.float()).abs().mean() * scale < 2


def test_tiles_are_chosen_and_counted_by_the_files_own_size() -> None:
    contents = [jpeg(photograph(1000, 500)), jpeg(photograph(403, 1001)), jpeg(photograph(90, 80))]
    whole, draft = (
        LlavaCompeteImageProcessor(SIZE, version=2, tiles=GRIDS, jpeg_draft=draft).preprocess(contents)
        for draft in (False, True)
    )
    assert draft["image_sizes"] == whole["image_sizes"] == [(500, 1000), (1001, 403), (80, 90)]
    for one, other in zip(whole["pixel_values"], draft["pixel_values"], strict=True):
        assert np.abs(one.astype(int) - other).mean() < 3
    processor = LlavaCompeteImageProcessor(SIZE, version=2, tiles=GRIDS, jpeg_draft=True)
    assert processor.fetch_images(contents[0]).size == (125, 62)  # its grid is 1 x 2 tiles: 28 x 56 pixels


KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "tiles": {"tiles": {"max": 4}},
    "scales": {"scales": (1, 2)},
    "patches": {"tower": TOWER, "naflex": {"max_patches": 64}},
}


@pytest.fixture(scope="module", params=KINDS)
def drafting(request: Any) -> Any:
    options = {"language": {"max_position_embeddings": 1024}, **KINDS[request.param]}
    model, processor = tiny_model(preprocess={"jpeg_draft": True}, **options)
    return model.eval(), processor


@pytest.mark.parametrize("draft", [True, False], ids=["draft", "whole"])
def test_training_evaluation_and_serving_see_the_same_pixels(
    drafting: Any, draft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = drafting
    monkeypatch.setattr(processor.image_processor, "jpeg_draft", draft)
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photograph(600, 451), orientation=6))
    turns = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": "the circle is red ."}]
    table = tmp_path / "rows.json"
    table.write_text(json.dumps([{"id": "a", "image": "photo.jpg", "conversations": turns}]))
    values = {"sources": [{"name": "rows", "path": str(table)}], "max_length": 1024, "cache_dir": tmp_path / "cache"}
    section = parse_config(DataSection, values, source="test")
    item = build_datasets(section, processor, seed=0).train[0]
    trained = item["pixel_values"]
    assert trained.dtype == torch.uint8
    whole = processor.image_processor([open_image(path)], return_tensors="pt")["pixel_values"]
    assert torch.equal(trained, whole) != draft

    opened = Image.open(path)
    url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    ways = [path, str(path), path.as_uri(), url, path.read_bytes(), opened, processor.open_image(path)]
    for way in ways:
        assert torch.equal(processor.image_processor([way], return_tensors="pt")["pixel_values"], trained), way
        messages = [{"role": "user", "content": [{"type": "image", "image": way}, {"type": "text", "text": "what ?"}]}]
        served = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(served["pixel_values"], trained)
        placeholders = int((served["input_ids"] == processor.image_token_id).sum())
        assert placeholders == int((item["input_ids"] == processor.image_token_id).sum())
    assert opened.size == (600, 451), "an image of the caller's is not changed"

    row = Rows([table], image_folder=tmp_path)[0]
    assert row.images[0].size == (451, 600)
    assert torch.equal(encode_row(row, processor)["pixel_values"], trained)

    given: list[Any] = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: given.append(k["pixel_values"]) or generate(*a, **k))
    Answerer(model, processor, 1).generate([Prompt("what ?", lambda: [opened])], [GenerationSettings((), 1, ())])
    assert torch.equal(given[0], trained)
    opened.close()


def test_the_setting_is_part_of_a_checkpoint(drafting: Any, tmp_path: Path) -> None:
    model, processor = drafting
    assert model.config.tower.preprocess.jpeg_draft
    processor.image_processor.save_pretrained(tmp_path)
    again = LlavaCompeteImageProcessor.from_pretrained(tmp_path)
    assert again.jpeg_draft
    assert not LlavaCompeteImageProcessor(SIZE).jpeg_draft
    content = jpeg(photograph(500, 400))
    np.testing.assert_array_equal(
        again([content])["pixel_values"], processor.image_processor([content])["pixel_values"]
    )
