"""A stage on pictures in tiles: any cut into micro-batches, with checkpointing, packing and validation, is one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_kit import run_stage_here
from PIL import Image
from stage_kit import fresh_model, read_metrics, stage_config, tiny_moe
from tiny import tiny_section, tiny_tokenizer

from llava_compete.errors import UserError
from llava_compete.model.build import build_model, load_checkpoint
from llava_compete.moe.config import MoeConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """16 rows: pictures of many shapes, a row of two, every fourth of text alone."""
    rng, records = np.random.default_rng(0), []
    for number in range(16):
        names = [] if number % 4 == 0 else [f"{number}.png"] if number != 5 else ["5.png", "6.png"]
        height, width = rng.integers(12, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "Which colour?"},
            {"from": "gpt", "value": "It is red" + "." * int(rng.integers(1, 9))},
        ]
        records.append({"id": f"row{number}", "image": names, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_any_cut_of_a_batch_is_one_run(data: Path, tmp_path: Path) -> None:
    model = fresh_model()
    model["vision_tower"]["tiles"] = {"max": 4}
    model["projector"]["pool"] = 2

    def run(name: str, packing: bool, tile_batch: int | None, **training: Any) -> list[dict[str, Any]]:
        training = {"max_steps": 2, **training}
        mine = {**model, "tile_batch": tile_batch}
        moe = {key: value for key, value in tiny_moe().items() if key != "vision"}
        config = stage_config("sft", data, tmp_path / name, model=mine, training=training, moe=moe, deepspeed=None)
        config["data"] |= {"validation_fraction": 0.1, "packing": packing, "cache_dir": str(tmp_path / "cache")}
        return read_metrics(run_stage_here(config))

    whole = run("whole", False, None, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=2)
    cut = run(
        "cut", True, 3, per_device_train_batch_size=2, gradient_accumulation_steps=4, activation_checkpointing=True
    )
    for one, other in zip(whole, cut, strict=True):
        assert one["sample_checksum"] == other["sample_checksum"]
        for key in ("loss", "lm_loss", "grad_norm", "projector/aux_loss", "language/aux_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
    section = tiny_section().model_copy(update={"tile_batch": 3})
    with pytest.raises(UserError, match=r"model\.tile_batch: found 3, but the tower has experts"):
        build_model(section, MoeConfig.model_validate({"vision": {}}), 0, tiny_tokenizer())
    loaded, processor = load_checkpoint(tmp_path / "cut")
    assert loaded.config.tiling == processor.tiling
    assert len(loaded.config.tower.tiles) == 8
