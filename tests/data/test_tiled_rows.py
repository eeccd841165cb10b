"""Rows of pictures in tiles or patches: tokens counted from headers, for the sampler, limit, packing and checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naflex_kit import TOWER
from PIL import ExifTags, Image
from tiny import tiny_model

from llava_compete.check.row_checks import TextSide, check_row
from llava_compete.config import parse_config
from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import build_datasets
from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import Answerer, Prompt
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.train.held_out import greedy_answers
from llava_compete.train.step_counts import gather
from llava_compete.vision import image_decoder

SIZES = [(28, 28), (30, 90), (90, 30), (61, 60), (40, 95), (200, 100)]


KINDS: dict[str, dict[str, Any]] = {"tiles": {"tiles": {}}, "patches": {"tower": TOWER, "naflex": {"max_patches": 64}}}


@pytest.fixture(scope="module", params=KINDS)
def sized(request: pytest.FixtureRequest) -> Any:
    """A model whose pictures have as many tokens as their size makes."""
    model, processor = tiny_model(**KINDS[request.param], language={"max_position_embeddings": 1024})
    return model.eval(), processor


@pytest.fixture(scope="module")
def tiled() -> Any:
    model, processor = tiny_model(tiles={}, language={"max_position_embeddings": 1024})
    return model.eval(), processor


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A row of each picture, one of two, one of text; the second picture lies on its side by EXIF."""
    rng, records = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        if number == 1:
            image, exif[ExifTags.Base.Orientation] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(tmp_path / f"{number}.png", exif=exif)
        records.append(record(str(number), [f"{number}.png"]))
    records += [record("two", ["0.png", "3.png"]), record("text", [])]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    return tmp_path / "rows.json"


def record(name: str, images: list[str]) -> dict[str, Any]:
    question = "<image>\n" * len(images) + "what colour ?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "the circle is red ."}]
    return {"id": name, "image": images, "conversations": turns}


def section(path: Path, **options: Any) -> DataSection:
    options = {"max_length": 512, "cache_dir": path.parent / "cache", **options}
    return parse_config(DataSection, {"sources": [{"name": "rows", "path": str(path)}], **options}, source="test")


def test_a_pictures_tokens_are_known_before_it_is_decoded(sized: Any, rows: Path, monkeypatch: Any) -> None:
    _, processor = sized
    data = build_datasets(section(rows), processor, seed=0).train
    expected = [processor.tiling.num_tokens(size) for size in SIZES]
    text = int(data.lengths[-1])
    assert (data.lengths[:6] - text).tolist() == expected
    assert data.lengths[6] - text == expected[0] + expected[3]
    for item, tokens in zip([data[number] for number in range(6)], expected, strict=True):
        assert int((item["input_ids"] == processor.image_token_id).sum()) == tokens
        assert item["pixel_values"].dtype == torch.uint8
        assert len(item["pixel_values"]) == processor.tiling.num_tiles(item["image_sizes"][0])
    # Headers are read once, and again for no row.
    monkeypatch.setattr("llava_compete.data.picture_sizes.image_size", None)
    assert np.array_equal(build_datasets(section(rows), processor, seed=0).train.lengths, data.lengths)


def test_a_batch_counts_pictures_and_gives_each_row_its_loss(sized: Any, rows: Path) -> None:
    model, processor = sized
    data = build_datasets(section(rows), processor, seed=0).train
    items = [data[number] for number in (4, 7, 6, 1)]
    packed, plain = Collator(processor, pack_to=512)(items), Collator(processor)(items)
    assert len(packed["input_ids"]) < 4
    counts = gather([dict(plain)], torch.device("cpu"), stop=False)
    assert (counts.images, counts.tiles) == (4, sum(len(item["pixel_values"]) for item in (items[0], *items[2:])))
    options = {"num_items_in_batch": 10}
    losses = []
    for batch in (packed, plain, *(Collator(processor)([item]) for item in items)):
        batch.pop("sample_ids")
        losses.append(model(**batch, **options).loss)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(sum(losses[2:]), losses[1])


def test_a_picture_is_whole_within_the_limit(sized: Any, rows: Path) -> None:
    _, processor = sized
    limit = processor.tiling.num_tokens(processor.tiling.largest) + 1
    data = build_datasets(section(rows, max_length=limit, max_rejected_share=1), processor, seed=0).train
    assert all(len(data[number]["input_ids"]) <= limit for number in range(len(data)))
    largest = processor.tiling.num_tokens(processor.tiling.largest)
    message = rf"data\.max_length: found {largest}, but a picture in (2 x 2 tiles|64 patches) makes {largest} tokens"
    with pytest.raises(UserError, match=message):
        section(rows, max_length=largest).check_tiles(processor.tiling)


def test_the_checker_counts_the_same(sized: Any, rows: Path) -> None:
    _, processor = sized
    side = TextSide(processor.tokenizer, processor.num_image_tokens, processor.tiling)
    source = section(rows).sources[0]
    for number, raw in enumerate(json.loads(rows.read_text())[:6]):
        facts = check_row(source, raw, number, side, 512)
        assert facts.problems == []
        assert facts.image_tokens == processor.tiling.num_tokens(SIZES[number])


def test_thin_pictures_are_named(tiled: Any, rows: Path) -> None:
    _, processor = tiled
    side = TextSide(processor.tokenizer, processor.num_image_tokens, processor.tiling)
    Image.new("RGB", (20000, 1)).save(rows.parent / "thin.png")
    facts = check_row(section(rows).sources[0], record("thin", ["thin.png"]), 0, side, 512)
    assert [kind for kind, _ in facts.problems] == ["image_too_small"]
    rows.write_text(json.dumps([record("thin", ["thin.png"])]))
    with pytest.raises(UserError, match="row rows/thin: image of 20000x1 pixels: so thin"):
        build_datasets(section(rows), processor, seed=0).train[0]


def test_a_bomb_is_known_by_its_header(tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("L", (200, 100)).save(tmp_path / "a.png")
    assert image_decoder.image_size(tmp_path / "a.png") == (100, 200)
    monkeypatch.setattr(image_decoder, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(image_decoder.BadImageError, match="200×100 pixels, at most 1,000"):
        image_decoder.image_size(tmp_path / "a.png")


def test_answers_do_not_depend_on_the_batch(sized: Any, rows: Path) -> None:
    model, processor = sized
    names = [rows.parent / f"{number}.png" for number in range(6)]
    prompts = [Prompt(f"what colour is {n} ?", lambda n=n: [Image.open(names[n])]) for n in range(6)]
    prompts.append(Prompt("<image> and <image> ?", lambda: [Image.open(names[4]), Image.open(names[0])]))
    settings = [GenerationSettings((), 4, ())] * len(prompts)
    found = [Answerer(model, processor, size).generate(prompts, settings) for size in (1, 8)]
    assert found[0] == found[1]
    scores = [Answerer(model, processor, size).log_likelihoods(prompts, ["red"] * 7) for size in (1, 8)]
    for one, other in zip(*scores, strict=True):
        assert one.negative_log_likelihood == pytest.approx(other.negative_log_likelihood, rel=1e-4)


def test_held_out_answers_see_their_pictures(sized: Any, rows: Path) -> None:
    model, processor = sized
    data = build_datasets(section(rows), processor, seed=0).train
    answers = greedy_answers(model, data, processor, count=8, device=torch.device("cpu"), synced=False)
    assert [answer["id"] for answer in answers][-2:] == ["rows/two", "rows/text"]
    assert data.image_filler()["image_sizes"] == [(8, 8)]
