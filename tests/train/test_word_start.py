"""The projector's start towards the words of the answers: its loss, which rows it takes, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_kit import stage_config
from tiny import tiny_model

from llava_compete.config import parse_config
from llava_compete.errors import UserError
from llava_compete.model.dtypes import cast
from llava_compete.parts import IGNORE_INDEX
from llava_compete.train.config import TrainConfig
from llava_compete.train.word_pages import word_embeddings
from llava_compete.train.word_start import WordStart, start_projector, word_loss

END = 3


def item(pictures: torch.Tensor | None, *answers: tuple[int, ...]) -> dict[str, Any]:
    """A row with an answer after each question of two tokens."""
    labels = [label for answer in answers for label in (IGNORE_INDEX, IGNORE_INDEX, *answer, END)]
    return {"pixel_values": pictures, "labels": torch.tensor(labels)}


def test_pictures_learn_the_words_of_their_first_answer() -> None:
    model, _ = tiny_model()
    size = model.config.tower.image_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    words = [(40, 41), (50,), (60, 61, 62), (50,)]
    rows = [item(pixels[n : n + 1], words[n], (70, 71)) for n in range(4)]
    rows += [item(None, (80,)), item(pixels[:2], (81,)), item(pixels[:1], ())]  # no picture, two, nothing said
    others = {name: value.clone() for name, value in model.state_dict().items() if "projector" not in name}

    before = torch.random.get_rng_state()
    assert start_projector(model, rows, WordStart(steps=200, batch_size=8, learning_rate=0.01), seed=0) == 1.0
    assert torch.equal(torch.random.get_rng_state(), before)  # the stage's own order of rows stays what it was

    embeddings = model.get_input_embeddings().weight.detach()
    targets = torch.stack([embeddings[list(answer)].mean(0) for answer in words])
    features = model.get_image_features(pixels).pooler_output.mean(1).detach()
    assert float(((features - targets).norm(dim=1) / targets.norm(dim=1)).max()) < 0.3
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_projector_in_bfloat16_learns_in_float32() -> None:
    model, _ = tiny_model()
    size = model.config.tower.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows = [item(pixels[n : n + 1], words) for n, words in enumerate([(40, 41), (50,)])]
    cast(model, torch.bfloat16)
    assert start_projector(model, rows, WordStart(steps=100, batch_size=4), seed=0) == 1.0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_words_are_what_the_language_model_reads() -> None:
    """Gemma's embeddings are scaled by sqrt(H) when they are called, and pictures join them behind that."""
    gemma = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    model, processor = tiny_model(language=gemma)
    size = model.config.tower.image_size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    start_projector(model, [item(pixels, (40, 41))], WordStart(steps=300, batch_size=1, learning_rate=0.01), seed=0)
    feature = model.get_image_features(pixels).pooler_output.mean((0, 1))
    read = model.get_input_embeddings()(torch.tensor([40, 41])).mean(0)
    assert float((feature - read).norm() / read.norm()) < 0.3
    words = word_embeddings(model, processor.tokenizer, ["circle"])
    ids = processor.tokenizer.encode(" circle", add_special_tokens=False)
    torch.testing.assert_close(words[0], model.get_input_embeddings()(torch.tensor(ids)).mean(0))


def test_the_loss_is_that_of_the_formula() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 2.0]], [[0.0, 3.0], [0.0, 1.0]]])
    words = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    cosines = torch.tensor([[0.5**0.5, 0.5**0.5, -1.0], [0.0, 1.0, -(0.5**0.5)]])  # of the means (1, 1) and (0, 2)
    likelihood = (2**0.5 * cosines).softmax(1)
    distances = torch.tensor([(1 + 5) / 2 / 4, (4 + 0) / 2 / 1])
    expected = -likelihood[[0, 1], [0, 1]].log().mean() + distances.mean()
    torch.testing.assert_close(word_loss(features, words, torch.tensor([0, 1])), expected)


def test_data_without_single_pictures_is_one_line() -> None:
    model, _ = tiny_model()
    with pytest.raises(UserError, match="word_start: no row of the data has exactly one picture and an answer"):
        start_projector(model, [item(None, (5, 6))], WordStart(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "pft"}, "word_start: stage pft with trainable.projector full, expected pretrain_align and full"),
        ({"trainable": {"language": "full"}}, "trainable.projector frozen"),
        ({"deepspeed": "zero3"}, "needs whole weights, which zero3 shards"),
        ({"tower": {"naflex": {}}}, r"found vision_tower\.naflex"),
    ],
)
def test_where_it_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    content = stage_config("pretrain_align", Path("d.json"), Path("out"))
    content["model"]["vision_tower"] |= changes.get("tower", {})
    changes = {key: value for key, value in changes.items() if key != "tower"}
    with pytest.raises(UserError, match=message):
        parse_config(TrainConfig, {**content, "word_start": {"steps": 1}, **changes}, source="x.yaml")
