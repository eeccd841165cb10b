"""A tiny checkpoint and local tasks for the evaluation tests."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tiny import tiny_model

from llava_compete.model.build import save_checkpoint

TASKS = Path(__file__).parent / "evaluation" / "lmms" / "local_tasks"
NUM_DOCUMENTS = 11
SAME_IMAGE = (1, 4)  # two documents that ask about one image
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def save_tiny(directory: Path, dense: bool = False, seed: int = 0, **moe: Any) -> Path:
    """A random checkpoint; with experts in the language model unless `dense`, of other settings if `moe` says so."""
    model, processor = tiny_model(None if dense else {"language": {**EXPERTS, **moe}}, seed=seed)
    save_checkpoint(model, processor, directory)
    return directory


def write_tasks(directory: Path) -> Path:
    """Copy the local tasks and write their documents: none, one or two images, questions of varied length."""
    shutil.copytree(TASKS, directory)
    generator = random.Random(0)
    words = ["what", "colour", "is", "the", "circle", "how", "many", "shapes", "are", "there"]
    rows: dict[str, list[Any]] = {key: [] for key in ("id", "type", "question", "answer", "choices", "label", "images")}
    for index in range(NUM_DOCUMENTS):
        row = {
            "id": f"doc{index}",
            "type": ("none", "one", "two")[index % 3],
            "question": " ".join(generator.choices(words, k=generator.randint(1, 25))),
            "answer": "two",
            "choices": ["red", "the circle is", "two shapes ."],
            "label": index % 3,
            "images": [_image(generator) for _ in range(index % 3)],
        }
        if index == SAME_IMAGE[1]:
            row["images"] = rows["images"][SAME_IMAGE[0]]
        for key, value in row.items():
            rows[key].append(value)
    features = datasets.Features(
        {
            **{key: datasets.Value("string") for key in ("id", "type", "question", "answer")},
            "choices": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
            "images": datasets.List(datasets.Image()),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(directory / "documents.parquet")
    return directory


def read_samples(directory: Path, task: str) -> dict[str, str]:
    """Answer by document id from samples/TASK.jsonl."""
    lines = (directory / "samples" / f"{task}.jsonl").read_text().splitlines()
    return {unit["id"]: unit["answer"] for unit in map(json.loads, lines)}


def _image(generator: random.Random) -> dict[str, Any]:
    buffer = io.BytesIO()
    color = tuple(generator.randrange(256) for _ in range(3))
    image = Image.new("RGB", (30, 24), color)
    image.putpixel((3, 4), (255, 255, 255))
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
