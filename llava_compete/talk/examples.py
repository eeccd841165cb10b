"""Questions to try: about rendered scenes, or of rows of data."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypedDict

from llava_compete.demo.scenes import render, sample_conversation, sample_scene

COUNT = 4


class Example(TypedDict):
    """A question and the files of its pictures, as Gradio's box for both takes it."""

    text: str
    files: list[str]


def scene_examples(folder: Path) -> list[Example]:
    """Of the demo's own kind; the pictures are written into `folder`."""
    examples = []
    for number in range(COUNT):
        rng = random.Random(number)
        scene = sample_scene(rng)
        file = folder / f"scene{number}.png"
        render(scene).save(file)
        examples.append(Example(text=sample_conversation(rng, scene, 1)[0].text, files=[str(file)]))
    return examples


def data_examples(data: Path, folder: Path) -> list[Example]:
    """The first questions of some rows, spread over anything that `report --data` takes.

    Raises:
        UserError: no such data, or a row or picture that cannot be used.
    """
    from llava_compete.evaluation.routing_data import Rows  # needs more packages than a page does

    rows = Rows([data], limit=COUNT)
    examples = []
    for number in range(len(rows)):
        row = rows[number].first_exchange()
        files = []
        for place, picture in enumerate(row.images):
            file = folder / f"{number}-{place}.png"
            picture.save(file)
            files.append(str(file))
        text = row.question.replace("<image>", "").strip()
        examples.append(Example(text=text, files=files))
    return examples
