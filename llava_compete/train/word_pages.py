"""A projector's start on pages whose words have places (`data/page_words`): each token is drawn to the words it shows.

The same for a square and for tiles, the whole picture's tokens too: a token shows a part of the picture, and its words
are those whose boxes have their centres there. A token without words is drawn to the embedding of a line break, which
the language model knows to be blank; left out, it would look like some word that is not there. Tokens of black borders
are left out: the model does not see them, or nothing in them. The tower's features are computed once.

loss = cross-entropy of sqrt(H) * cos(token, embedding of a word) over all distinct words, against equal shares of the
       token's own + |token - mean embedding of its own|² / |that mean|², each a mean over tokens.
Suffixes: n tokens, F features that become one token, D their width, H the language model's, A words, M most words of a
token.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.data.page_words import Word
from llava_compete.errors import UserError
from llava_compete.train.word_start import WordStart, in_float32, likeness, mean_embedding
from llava_compete.vision.image_decoder import Size
from llava_compete.vision.projector import pooled
from llava_compete.vision.token_maps import TokenMap, boxes_of_tokens, tile_cells, token_maps

logger = logging.getLogger(__name__)

BLANK = "\n"
_PAGES_AT_ONCE = 8
_HELD_OUT = 10  # one page of so many is not trained on, to tell what others will look like


class PageStart(NamedTuple):
    """Of the words that tokens show: the share that are nearest to them, on pages trained on and on others.

    A token of m words counts for each that is among the m words nearest to it. By what shows them: `whole`, tokens of
    the whole picture, and `tiles`, where pictures have some.
    """

    trained: dict[str, float]
    held_out: dict[str, float]


class _Page(NamedTuple):
    """position: of its row; features: of its tokens, their places among those of its tiles; words: of each token."""

    position: int
    features: np.ndarray
    words: list[list[int]]


class _Tokens(NamedTuple):
    """features: bfloat16 [n, F, D]; own: int64 [n, M], numbers of words, -1 beyond them; in_tiles: bool [n].

    starts: of each page, and n.
    """

    features_nFD: Tensor
    own_nM: Tensor
    in_tiles_n: Tensor
    starts: list[int]


def start_on_pages(model: Any, dataset: Any, section: WordStart, seed: int, bf16: bool = False) -> PageStart:
    """Train `model`'s projector in place on rows of `dataset` with words; the others do not count.

    bf16: the tower multiplies in bfloat16, as in the stage's steps. Features are always kept in it: tokens * F * D * 2
    bytes. The rest is as in `start_projector`.

    Raises:
        UserError: a word outside its picture, or no page with a word on it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.from_numpy(dataset.with_words())
    rows = rows[torch.randperm(len(rows), generator=generator)[: section.max_rows]]
    vocabulary = {BLANK: 0}
    pages = [page for row in rows.tolist() if (page := _read_page(model, dataset, row, vocabulary)) is not None]
    if len(vocabulary) == 1:
        raise UserError("word_start: no row of the data has a word on its picture")
    words_AH = word_embeddings(model, dataset.processor.tokenizer, list(vocabulary))
    tokens = _compute(model, dataset, pages, bf16)
    num_pages = len(tokens.starts) - 1
    num_trained = num_pages - num_pages // _HELD_OUT
    with in_float32(model.multi_modal_projector) as projector:
        optimizer = torch.optim.AdamW(projector.parameters(), lr=section.learning_rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, section.steps)
        for _ in range(section.steps):
            chosen = torch.randint(num_trained, (section.batch_size,), generator=generator).tolist()
            places = _of_pages(tokens, chosen)
            loss = page_loss(_embedded(projector, tokens.features_nFD[places]), words_AH, tokens.own_nM[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        trained = _shares_found(projector, tokens, range(num_trained), words_AH)
        held_out = _shares_found(projector, tokens, range(num_trained, num_pages), words_AH)
    logger.info(
        "word_start: %d pages, %d words; after %d steps the words nearest to the tokens that show them: %s; "
        "on %d pages held out: %s",
        *(
            num_trained,
            len(words_AH) - 1,
            section.steps,
            _percent(trained),
            num_pages - num_trained,
            _percent(held_out),
        ),
    )
    return PageStart(trained, held_out)


def page_loss(embeddings_nH: Tensor, words_AH: Tensor, own_nM: Tensor) -> Tensor:
    """See the module. own_nM: numbers of each token's words, -1 where it has no more."""
    shares_nA = _shares(own_nM, len(words_AH))
    targets_nH = shares_nA @ words_AH
    distance = (embeddings_nH - targets_nH).square().sum(-1) / targets_nH.square().sum(-1)
    return F.cross_entropy(likeness(embeddings_nH[:, None], words_AH), shares_nA) + distance.mean()


def word_embeddings(model: Any, tokenizer: Any, words: list[str]) -> Tensor:
    """[A, H] float32: the mean embedding of each word's tokens as they are in a text, behind a space."""
    before = tokenizer.encode("x", add_special_tokens=False)
    found = []
    for word in words:
        # Behind another word: alone, some tokenizers would put a second space before it.
        ids = tokenizer.encode("x" + (word if word == BLANK else f" {word}"), add_special_tokens=False)
        ids = ids[len(before) :] if ids[: len(before)] == before else ids
        found.append(mean_embedding(model, ids))
    return torch.stack(found)


def words_of_features(model: Any, processor: Any, picture: Size, words: list[Word]) -> dict[int, list[int]]:
    """By place among the projected features of a picture's tiles: the numbers of the words that its token shows."""
    config, tiling = model.config, model.config.tiling
    rows, columns = (side // config.projector.pool for side in model.vision_tower.grid)
    whole = TokenMap(tile_cells(rows, columns, config.num_image_tokens), processor.image_processor.box(picture))
    shown = boxes_of_tokens(token_maps(whole, tiling, picture), picture, [word.box for word in words])
    if tiling is None:
        return shown
    layout = tiling.layout([picture])
    return {int(source): shown[place] for source, place in zip(layout.sources, layout.places.tolist(), strict=True)
            if place in shown}  # fmt: skip


def _read_page(model: Any, dataset: Any, position: int, vocabulary: dict[str, int]) -> _Page | None:
    """Where the words of a page are among its features; new ones get the next number of `vocabulary`."""
    read = dataset.page_words(position)
    if read is None:
        return None
    picture, words = read
    numbers = [vocabulary.setdefault(word.text, len(vocabulary)) for word in words]
    found = words_of_features(model, dataset.processor, picture, words)
    own = [[numbers[word] for word in shown] or [0] for shown in found.values()]
    return _Page(position, np.array(list(found)), own)


def _compute(model: Any, dataset: Any, pages: list[_Page], bf16: bool) -> _Tokens:
    """Features of all pages, before the projector; a page that cannot be read is passed over where bad images are."""
    device, config = model.get_input_embeddings().weight.device, model.config
    most = max(len(shown) for page in pages for shown in page.words)
    room = sum(len(page.words) for page in pages)
    own_nM, in_tiles_n = torch.full((room, most), -1), torch.zeros(room, dtype=torch.bool)
    features_nFD, starts = None, [0]
    for first in range(0, len(pages), _PAGES_AT_ONCE):
        group = [(page, dataset.pictures(page.position)) for page in pages[first : first + _PAGES_AT_ONCE]]
        read = [(page, item["pixel_values"]) for page, item in group if item is not None]
        if not read:
            continue
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tower = model.vision_tower(torch.cat([pixels for _, pixels in read]).to(device))
        # What is pooled stands side by side, so that each token's features are a map of their own.
        square = pooled(tower, config.projector.pool, "shuffle").unflatten(-1, (config.projector.pool**2, -1))
        if features_nFD is None:
            features_nFD = torch.empty((room, *square.shape[2:]), dtype=torch.bfloat16, device=device)
        for (page, _), tiles in zip(read, square.split([len(pixels) for _, pixels in read]), strict=True):
            start, stop = starts[-1], starts[-1] + len(page.words)
            features_nFD[start:stop] = tiles.flatten(0, 1)[torch.from_numpy(page.features).to(device)]
            own_nM[start:stop] = torch.tensor([shown + [-1] * (most - len(shown)) for shown in page.words])
            in_tiles_n[start:stop] = torch.from_numpy(page.features >= config.num_image_tokens)
            starts.append(stop)
    if features_nFD is None:
        raise UserError("word_start: no picture of a row with page_words can be read")
    stop = starts[-1]
    return _Tokens(features_nFD[:stop], own_nM[:stop].to(device), in_tiles_n[:stop].to(device), starts)


def _of_pages(tokens: _Tokens, pages: list[int]) -> Tensor:
    """Which tokens are of some pages."""
    places = [torch.arange(tokens.starts[page], tokens.starts[page + 1]) for page in pages]
    return torch.cat(places).to(tokens.own_nM.device)


def _embedded(projector: Any, features_nFD: Tensor) -> Tensor:
    """[n, H]"""
    return projector(features_nFD.float()).squeeze(1)


def _shares(own_nM: Tensor, num_words: int) -> Tensor:
    """[n, A]: equal shares of a token's words; one that stands there twice has two."""
    counts_nA = torch.zeros(len(own_nM), num_words + 1, device=own_nM.device)
    counts_nA = counts_nA.scatter_add(1, own_nM % (num_words + 1), torch.ones(own_nM.shape, device=own_nM.device))
    counts_nA = counts_nA[:, :-1]  # -1 went into the last
    return counts_nA / counts_nA.sum(1, keepdim=True)


@torch.no_grad()
def _shares_found(projector: Any, tokens: _Tokens, pages: range, words_AH: Tensor) -> dict[str, float]:
    """See `PageStart`; blank tokens do not count, nor the line break as a word."""
    counts = torch.zeros(2, 2)  # whole and tiles; found and all
    for page in pages:
        places = _of_pages(tokens, [page])
        is_own_nA = _shares(tokens.own_nM[places], len(words_AH))[:, 1:] > 0
        likeness_nA = likeness(_embedded(projector, tokens.features_nFD[places])[:, None], words_AH)[:, 1:]
        ranks_nA = likeness_nA.argsort(1, descending=True).argsort(1)
        found_n = (is_own_nA & (ranks_nA < is_own_nA.sum(1, keepdim=True))).sum(1)
        for part, chosen_n in enumerate((~tokens.in_tiles_n[places], tokens.in_tiles_n[places])):
            counts[part] += torch.stack([found_n[chosen_n].sum(), is_own_nA[chosen_n].sum()]).cpu()
    return {
        name: float(found / total) for name, (found, total) in zip(("whole", "tiles"), counts, strict=True) if total
    }


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items()) or "none"
