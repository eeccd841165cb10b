"""Rows of pictures of many shapes, and tiny models that cut them into tiles or patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from naflex_kit import TOWER
from PIL import Image
from stage_kit import fresh_model


def write_tiled_rows(folder: Path, rows: int = 16, text_every: int = 4) -> Path:
    """Pictures of 12 to 59 pixels a side, a row of two, every `text_every`-th of text alone; returns the rows' file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, records = np.random.default_rng(0), []
    for number in range(rows):
        names = [] if number % text_every == 0 else [f"{number}.png"] if number != 5 else ["5.png", "6.png"]
        height, width = rng.integers(12, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "Which colour?"},
            {"from": "gpt", "value": "It is red" + "." * int(rng.integers(1, 9))},
        ]
        records.append({"id": f"row{number}", "image": names, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def tiled_model() -> dict[str, Any]:
    """The `model:` section of a new model of up to four tiles and a whole, four features made one token."""
    model = fresh_model()
    model["vision_tower"]["tiles"] = {"max": 4}
    model["projector"]["pool"] = 2
    return model


def naflex_model() -> dict[str, Any]:
    """The `model:` section of a new model with a NaFlex tower."""
    return fresh_model() | {"vision_tower": {"config": TOWER, "naflex": {"max_patches": 24}}}
