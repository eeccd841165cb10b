"""Held-out rows: ranks never part, and the loss is the mean over tokens whatever the batches hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from llava_compete.data.collator import Collator
from llava_compete.data.config import DataSection
from llava_compete.data.dataset import build_datasets
from llava_compete.parts import IGNORE_INDEX
from llava_compete.train import held_out


@pytest.fixture(scope="module")
def model_and_processor() -> tuple[Any, Any]:
    return tiny_model(moe={"language": {"num_experts": 3, "num_experts_per_tok": 2}})


def talk(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]


def rows_of(kind: str, count: int = 60) -> list[dict[str, Any]]:
    """Rows that hold something else, once read, than the file says: other rows in their place, or fewer turns."""
    if kind == "bad images":
        images = ["bad.png" if n % 5 == 0 else "ok.png" for n in range(count)]
        texts = {n for n in range(count) if n % 3 == 0}
        return [
            {"id": f"r{n}", "conversations": talk("say red")}
            if n in texts
            else {"id": f"r{n}", "image": images[n], "conversations": talk("<image>\nwhat")}
            for n in range(count)
        ]
    turns = [talk("say red") + talk("<image>\n" + "what " * (1 if n % 2 else 300)) for n in range(count)]
    return [{"id": f"c{n}", "image": "ok.png", "conversations": turns[n]} for n in range(count)]


def held_out_rows(folder: Path, rows: list[dict[str, Any]], processor: Any) -> Any:
    Image.new("RGB", (20, 20), (255, 0, 0)).save(folder / "ok.png")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "d.json").write_text(json.dumps(rows))
    section = DataSection(
        sources=[{"name": "s", "path": str(folder / "d.json")}],
        max_length=128,
        on_bad_image="skip",
        validation_fraction=0.4,
        cache_dir=folder / "cache",
    )
    return build_datasets(section, processor, 0).validation


@pytest.mark.parametrize("kind", ["bad images", "turns cut off"])
@pytest.mark.parametrize("pack_to", [None, 256])
def test_all_ranks_run_the_tower_or_none(
    tmp_path: Path, kind: str, pack_to: int | None, model_and_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = model_and_processor
    dataset = held_out_rows(tmp_path, rows_of(kind), processor)
    monkeypatch.setattr(held_out.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(held_out.dist, "get_world_size", lambda: 3)
    views = []
    for rank in range(3):
        monkeypatch.setattr(held_out.dist, "get_rank", lambda rank=rank: rank)
        batches = held_out._equal_batches(dataset, Collator(processor, pack_to), 1)
        views.append(["pixel_values" in batch for _, batch in batches])
    assert views[0] == views[1] == views[2]
    assert len(views[0]) == -(-len(dataset) // 3)


@pytest.mark.parametrize("pack_to", [None, 256])
def test_a_blank_image_beside_the_rows_changes_no_loss(
    tmp_path: Path, pack_to: int | None, model_and_processor: Any
) -> None:
    model, processor = model_and_processor
    dataset = held_out_rows(tmp_path, rows_of("bad images", 30), processor)
    alone = Collator(processor)
    total = tokens = 0.0
    model.eval()
    for number in range(len(dataset)):
        batch = alone([dataset[number]])
        with torch.no_grad():
            batch.pop("sample_ids")
            total += float(model(**batch, num_items_in_batch=1).lm_loss)
        tokens += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    for size in (1, 4):
        collate = Collator(processor, pack_to)
        found = held_out.validation_loss(model, dataset, collate, batch_size=size, device=torch.device("cpu"))
        assert found["eval_tokens"] == tokens
        assert found["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_rows_without_images_get_none(tmp_path: Path, model_and_processor: Any) -> None:
    _, processor = model_and_processor
    rows = [{"id": str(number), "conversations": talk("say red")} for number in range(20)]
    dataset = held_out_rows(tmp_path, rows, processor)
    assert all("pixel_values" not in batch for _, batch in held_out._equal_batches(dataset, Collator(processor), 2))
