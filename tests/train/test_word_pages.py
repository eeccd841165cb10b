"""A projector's start on pages: which token is drawn to which word, the loss, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from stage_kit import stage_config
from tiny import tiny_model

from llava_compete.config import parse_config
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import ConversationDataset, build_datasets
from llava_compete.data.page_words import Word
from llava_compete.errors import UserError
from llava_compete.train.config import TrainConfig
from llava_compete.train.word_pages import page_loss, start_on_pages, word_embeddings, words_of_features
from llava_compete.train.word_start import WordStart, start_projector

SIDE = 112  # of a page, shown as a square of 28 or in 2 x 2 tiles of 28; a token shows 56 or, pooled in a tile, 28
# By hand, by what tokens of a tile show; the last stands across a border, its centre right of it.
WORDS = [
    Word("circle", (2, 4, 20, 12)), Word("red", (30, 4, 50, 12)), Word("two", (60, 5, 80, 15)),
    Word("shapes", (3, 60, 25, 70)), Word("there", (80, 90, 100, 99)),
]  # fmt: skip
COLOURS = {"circle": "black", "red": "red", "two": "yellow", "shapes": "blue", "there": "lime"}
IN_SQUARE = {0: [0, 1], 1: [2], 2: [3], 3: [4]}


@pytest.fixture(scope="module", params=[None, {}], ids=["square", "tiles"])
def shown(request: pytest.FixtureRequest) -> Any:
    """A tiny model of four tokens a square, and its processor."""
    return tiny_model(pool=2, **({} if request.param is None else {"tiles": request.param}))


def write_rows(folder: Path, words: list[list[Word]], size: int = SIDE) -> ConversationDataset | Any:
    """Pages on which each word has a colour of its own; returns how to open them with a processor."""
    records = []
    for number, page in enumerate(words):
        image = Image.new("RGB", (size, size), "white")
        for text, box in page:
            ImageDraw.Draw(image).rectangle(box, COLOURS[text])
        image.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nread"}, {"from": "gpt", "value": "red"}]
        found = [word._asdict() for word in page]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns, "page_words": found})
    (folder / "rows.json").write_text(json.dumps(records))
    content = {"sources": [{"name": "pages", "path": str(folder / "rows.json")}], "cache_dir": str(folder / "cache")}
    section = parse_config(DataSection, content, source="test")
    return lambda processor: build_datasets(section, processor, seed=0).train


def test_tokens_have_the_words_whose_centres_they_show(shown: Any) -> None:
    model, processor = shown
    found = words_of_features(model, processor, (SIDE, SIDE), WORDS)
    if model.config.tiling is None:
        assert found == IN_SQUARE
        return
    # Behind the whole picture, tile by tile: 28 pixels a token. Tile 0 has circle, red; 1 two; 2 shapes; 3 there.
    tiles = {4: [0], 5: [1], 6: [], 7: [], 8: [2], 9: [], 10: [], 11: [], 12: [3], 13: [], 14: [], 15: []}
    assert found == {**IN_SQUARE, **tiles, 16: [], 17: [], 18: [], 19: [4]}


def test_borders_are_left_out() -> None:
    model, processor = tiny_model(pool=2, tiles={})
    # A picture of 224 x 56: 1 x 2 tiles of which the upper and lower half are black.
    wide = Word("two", (150, 10, 170, 20))
    found = words_of_features(model, processor, (56, 224), [wide])
    grid = {token: words for token, words in found.items() if token >= 4}
    boxes = model.config.tiling
    assert set(grid) == {int(source) for source in boxes.layout([(56, 224)]).sources if source >= 4}
    assert sum(words == [0] for words in grid.values()) == 1


def test_pages_learn_their_words(shown: Any, tmp_path: Path) -> None:
    model, processor = shown
    rng = np.random.default_rng(1)
    boxes = [(x, y, x + 28, y + 28) for y in range(0, SIDE, 28) for x in range(0, SIDE, 28)]
    pages = [[Word(str(rng.choice(list(COLOURS))), box) for box in boxes] for _ in range(40)]
    data = write_rows(tmp_path, pages)(processor)
    others = {name: value.clone() for name, value in model.state_dict().items() if "projector" not in name}
    found = start_on_pages(model, data, WordStart(steps=150, batch_size=4, learning_rate=0.01), seed=0)
    parts = {"whole"} | ({"tiles"} if model.config.tiling else set())
    assert set(found.trained) == set(found.held_out) == parts
    assert min(found.trained.values()) > 0.8
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_words_are_embedded_as_they_are_in_a_text() -> None:
    model, processor = tiny_model()
    tokenizer = processor.tokenizer
    found = word_embeddings(model, tokenizer, ["red", "\n"])
    for row, text in zip(found, (" red", "\n"), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        torch.testing.assert_close(row, model.get_input_embeddings().weight[ids].mean(0).detach())


def test_the_loss_is_that_of_the_formula() -> None:
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    own = torch.tensor([[0, 2, 2], [1, -1, -1]])
    likelihood = (2**0.5 * torch.tensor([[1.0, 0.0, 0.5**0.5], [0.0, 1.0, 0.5**0.5]])).log_softmax(1)
    entropy = -(likelihood[0, 0] / 3 + 2 * likelihood[0, 2] / 3 + likelihood[1, 1]) / 2
    target = torch.tensor([1.0, 2 / 3])  # a third of the first, two of the third
    distance = ((embeddings[0] - target).square().sum() / target.square().sum() + 1) / 2
    torch.testing.assert_close(page_loss(embeddings, words, own), entropy + distance)


def test_a_word_outside_its_picture_is_named(tmp_path: Path) -> None:
    model, processor = tiny_model()
    data = write_rows(tmp_path, [[Word("red", (100, 4, 120, 12))]])(processor)
    message = (
        r"row pages/0: page_words\[0\] 'red': box \[100.0, 4.0, 120.0, 12.0\] reaches outside the picture of 112x112"
    )
    with pytest.raises(UserError, match=message):
        start_on_pages(model, data, WordStart(steps=1), seed=0)


def test_tiles_without_words_are_one_line() -> None:
    model, _ = tiny_model(tiles={})
    with pytest.raises(UserError, match=r"word_start: pictures in tiles need the words of pages \(page_words\)"):
        start_projector(model, [], WordStart(), seed=0)


def test_a_stage_in_tiles_may_have_it() -> None:
    content = stage_config("pretrain_align", Path("d.json"), Path("out"))
    content["model"]["vision_tower"]["tiles"] = {"max": 2}
    assert parse_config(TrainConfig, {**content, "word_start": {"steps": 1}}, source="x.yaml").word_start is not None
