"""What everything agrees on: the three parts of a model, and the two constants of a row of training data."""

from __future__ import annotations

from typing import Literal

Part = Literal["vision", "projector", "language"]
# In the order in which an image passes through them.
PARTS: tuple[Part, ...] = ("vision", "projector", "language")

# Where each part's parameters lie in the model: transformers' own names for a Llava model.
PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}

# A label of this value is not predicted; torch's cross entropy and every Hugging Face model skip it.
IGNORE_INDEX = -100
# Stands for one image in a text, and for one image feature among a row's tokens.
IMAGE_TOKEN = "<image>"


def part_of(parameter: str) -> Part:
    """The part that a parameter of the model belongs to, by its name."""
    for part, prefixes in PREFIXES.items():
        if parameter.startswith(prefixes):
            return part
    raise ValueError(f"{parameter}: lies under none of {', '.join(sum(PREFIXES.values(), ()))}")
