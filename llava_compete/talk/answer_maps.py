"""One answer's routing as HTML: experts over the pictures, under the answer's tokens, and their shares of use."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from llava_compete.evaluation.picture_choices import picture_maps, shown_pictures
from llava_compete.parts import PARTS
from llava_compete.report.choice_maps import map_of_layers, token_table
from llava_compete.report.heat_maps import as_data_url, load_maps, render
from llava_compete.talk.talker import Answer, Talker

MOST_TOKENS = 60  # of the answer, in the table
# pyplot keeps its figures in one place for all threads.
_drawing = threading.Lock()


def experts_html(talker: Talker, answer: Answer, pictures: Sequence[Image.Image]) -> str:
    """What the tokens of the last answer, and of the conversation before it, were routed to.

    Args:
        pictures: of the whole conversation, in order.
    """
    routed = answer.routed
    if not routed:
        return "<p>This model is dense: it has no experts.</p>"
    count = max(tokens.num_experts for tokens in routed.values())
    parts: list[str] = []
    with _drawing:
        for number, (figure, caption) in enumerate(_picture_figures(talker, answer, pictures, count)):
            parts.append(_figure(figure, f"Picture {number + 1}. {caption}", "map"))
        parts += _tokens(talker, answer, count)
        for part in PARTS:
            use = {name: kinds for name, kinds in answer.expert_use().items() if name.startswith(f"{part}.")}
            if not use:
                continue
            kinds = list(dict.fromkeys(kind for found in use.values() for kind in found))
            loads = {kind: {name: found[kind] for name, found in use.items() if kind in found} for kind in kinds}
            caption = (
                f"{part}: share of the choices of each expert, in multiples of even use, by layer and kind of token."
            )
            parts.append(_figure(load_maps(loads), caption, "use"))
    return f'<div class="experts">{"".join(parts)}</div>'


def _picture_figures(talker: Talker, answer: Answer, pictures: Sequence[Image.Image], count: int) -> Any:
    if not pictures:
        return
    shown = shown_pictures(talker.processor, pictures)
    (places_T,) = np.nonzero(answer.image_places_T.numpy())
    experts = {name: tokens.prompt_TK.numpy() for name, tokens in answer.routed.items()}
    maps = picture_maps(talker.model, experts, places_T, shown)
    for number, picture in enumerate(shown):
        yield map_of_layers(picture, {layer: of_layer[number] for layer, of_layer in maps.items()}, count)


def _tokens(talker: Talker, answer: Answer, count: int) -> list[str]:
    """The last token that was written went through no layer: nothing is written behind it."""
    rows = {
        name: tokens.answer_TK[:MOST_TOKENS].numpy()
        for name, tokens in answer.routed.items()
        if name.startswith("language.") and len(tokens.answer_TK)
    }
    if not rows:
        return []
    length = len(next(iter(rows.values())))
    words = [talker.processor.tokenizer.decode([token]) for token in answer.token_ids[:length]]
    caption = "The answer's tokens, and under each its experts by layer, the one with the largest weight first."
    return [f"<figure>{token_table(words, rows, count)}<figcaption>{escape(caption)}</figcaption></figure>"]


def _figure(figure: plt.Figure, caption: str, kind: str) -> str:
    png = render(figure, "png")
    plt.close(figure)
    image = f'<img class="{kind}" alt="{escape(caption)}" src="{as_data_url(png)}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
