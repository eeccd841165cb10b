"""A projector's start: each picture's features are drawn to the language model's own embeddings of its answer.

Before the first step of a stage with `word_start`. Tower and embeddings stand still, so the features are computed once
and a step is two small products: minutes of `pretrain_align`, whose gradient comes back through every layer of the
language model, become seconds. A picture of a tiger then reads like the words of its answer.

loss = cross-entropy of sqrt(H) * cos(mean feature, mean embedding of an answer) over all distinct answers
     + |feature - embedding|² / |embedding|², each a mean over features: direction and scale of what the model knows.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from llava_compete.config import StrictConfig
from llava_compete.errors import UserError
from llava_compete.parts import IGNORE_INDEX

logger = logging.getLogger(__name__)

_PICTURES_AT_ONCE = 32


class WordStart(StrictConfig):
    """The projector's start towards the words of the answers, before the first step."""

    steps: int = Field(default=300, ge=1, description="steps on cached features")
    batch_size: int = Field(default=32, ge=1, description="pictures of a step")
    learning_rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="of AdamW: constant, on pages falling to 0"
    )
    max_rows: int = Field(default=4096, ge=1, description="rows that are looked at, drawn from all")


def start_projector(model: Any, dataset: Any, section: WordStart, seed: int) -> float:
    """Train `model`'s projector in place on rows of `dataset` with one picture; the others' first answers do not count.

    model: dense, on the CPU or a device, whole on every rank; all ranks do the same and end alike.

    Returns:
        the share of these pictures whose mean feature is nearest to its own answer among all answers.

    Raises:
        UserError: no row has one picture and an answer, or pictures are in tiles.
    """
    if model.config.tiling is not None:
        raise UserError("word_start: pictures in tiles need the words of pages (page_words), and no row has any")
    pairs = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(dataset), generator=pairs)[: section.max_rows].tolist()
    pictures, answers = _pictures_and_answers(dataset, rows)
    if not pictures:
        raise UserError("word_start: no row of the data has exactly one picture and an answer")
    distinct = list(dict.fromkeys(answers))
    words = torch.stack([mean_embedding(model, answer) for answer in distinct])
    own = torch.tensor([distinct.index(answer) for answer in answers], device=words.device)
    with torch.no_grad():
        groups = torch.stack(pictures).split(_PICTURES_AT_ONCE)
        features = torch.cat([model.vision_tower(group.to(words.device)) for group in groups]).float()
    with in_float32(model.multi_modal_projector) as projector:
        optimizer = torch.optim.AdamW(projector.parameters(), lr=section.learning_rate, weight_decay=0.0)
        for _ in range(section.steps):
            chosen = torch.randint(len(features), (section.batch_size,), generator=pairs).to(words.device)
            loss = word_loss(projector(features[chosen]), words, own[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            nearest = likeness(torch.cat([projector(group) for group in features.split(_PICTURES_AT_ONCE)]), words)
    share = float((nearest.argmax(1) == own).float().mean())
    logger.info(
        "word_start: %d pictures, %d answers; after %d steps %.0f%% of the pictures are nearest to their own",
        *(len(features), len(words), section.steps, 100 * share),
    )
    return share


@contextmanager
def in_float32(projector: Any) -> Iterator[Any]:
    """A copy to train, whose weights `projector` has afterwards: most steps would be lost in bfloat16's rounding."""
    trained = copy.deepcopy(projector).float()
    yield trained
    projector.load_state_dict(trained.state_dict())


@torch.no_grad()
def mean_embedding(model: Any, tokens: Sequence[int]) -> Tensor:
    """[H] float32: of what the embeddings' own call gives, since Gemma's scales its weights there."""
    embeddings = model.get_input_embeddings()
    ids = torch.tensor(tokens, dtype=torch.int64, device=embeddings.weight.device)
    return embeddings(ids).float().mean(0)


def word_loss(embeddings_nPH: Tensor, words_AH: Tensor, own_n: Tensor) -> Tensor:
    """See the module. own_n: the number of each picture's answer in `words_AH`."""
    targets_n1H = words_AH[own_n][:, None]
    distance = (embeddings_nPH - targets_n1H).square().sum(-1) / targets_n1H.square().sum(-1)
    return F.cross_entropy(likeness(embeddings_nPH, words_AH), own_n) + distance.mean()


def likeness(embeddings_nPH: Tensor, words_AH: Tensor) -> Tensor:
    """[n, A]: sqrt(H) times the cosine of each mean over P to each word."""
    scale = math.sqrt(words_AH.shape[1])
    return scale * F.normalize(embeddings_nPH.mean(1), dim=-1) @ F.normalize(words_AH, dim=-1).T


def _pictures_and_answers(dataset: Any, rows: list[int]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Pixels, and the tokens of the first answer without what ends a turn, of each row with one picture."""
    pictures, answers = [], []
    for row in rows:
        item = dataset[row]
        pixels, answer = item["pixel_values"], _first_answer(item["labels"].tolist())
        if pixels is not None and len(pixels) == 1 and len(answer) > 1:
            pictures.append(pixels[0])
            answers.append(answer[:-1])
    return pictures, answers


def _first_answer(labels: list[int]) -> tuple[int, ...]:
    start = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    stop = next((place for place in range(start, len(labels)) if labels[place] == IGNORE_INDEX), len(labels))
    return tuple(labels[start:stop])
