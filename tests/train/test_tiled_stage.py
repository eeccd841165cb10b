"""A stage on pictures in tiles: any cut into micro-batches, with checkpointing, packing and validation, is one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import run_stage_here, stop_at_step
from safetensors.torch import load_file
from stage_kit import read_metrics, stage_config, tiny_moe
from tiled_kit import naflex_model, tiled_model, write_tiled_rows
from tiny import tiny_section, tiny_tokenizer

from llava_compete.errors import UserError
from llava_compete.model.build import build_model, load_checkpoint
from llava_compete.moe.config import MoeConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiled_rows(tmp_path_factory.mktemp("tiled"))


def stage(data: Path, out: Path, tile_batch: int | None = None, packing: bool = False, **changes: Any) -> Any:
    """A stage of 2 steps on a model of tiles; experts in projector and language model where it is an sft."""
    moe = {"moe": {key: value for key, value in tiny_moe().items() if key != "vision"}}
    kind, model = changes.pop("stage", "sft"), changes.pop("model", None) or tiled_model()
    training = {"max_steps": 2, "per_device_train_batch_size": 8, **changes.pop("training", {})}
    options = {"model": {**model, "tile_batch": tile_batch}, "training": training, "deepspeed": None}
    config = stage_config(kind, data, out, **options, **(moe if kind == "sft" else {}), **changes)
    config["data"] |= {"validation_fraction": 0.1, "packing": packing, "cache_dir": str(data.parent / "cache")}
    return config


@pytest.mark.parametrize("kind", [tiled_model, naflex_model])
def test_any_cut_of_a_batch_is_one_run(data: Path, tmp_path: Path, kind: Callable[[], dict[str, Any]]) -> None:
    chunks = 3 if kind is tiled_model else None
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    whole = read_metrics(run_stage_here(stage(data, tmp_path / "whole", model=kind(), training=evaluated)))
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "activation_checkpointing": True}
    cut = read_metrics(
        run_stage_here(stage(data, tmp_path / "cut", chunks, packing=True, model=kind(), training=small))
    )
    for one, other in zip(whole, cut, strict=True):
        assert one["sample_checksum"] == other["sample_checksum"]
        for key in ("loss", "lm_loss", "grad_norm", "projector/aux_loss", "language/aux_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
    loaded, processor = load_checkpoint(tmp_path / "cut")
    assert loaded.config.tiling == processor.tiling
    assert len(loaded.config.tower.tiles or ()) == (8 if kind is tiled_model else 0)


def test_towers_with_experts_take_all_tiles_at_once() -> None:
    section = tiny_section().model_copy(update={"tile_batch": 3})
    with pytest.raises(UserError, match=r"model\.tile_batch: found 3, but the tower has experts"):
        build_model(section, MoeConfig.model_validate({"vision": {}}), 0, tiny_tokenizer())


@pytest.mark.parametrize("kind", [tiled_model, naflex_model])
def test_lora_on_the_tower_resumes_in_chunks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], dict[str, Any]]
) -> None:
    """Tiles in chunks; a NaFlex tower takes all pictures at once."""
    chunks = 2 if kind is tiled_model else None
    first = stage(data, tmp_path / "start", stage="pretrain_align", model=kind(), training={"max_steps": 1})
    start = run_stage_here(first)
    lora = {"mode": "lora", "lora_rank": 2}

    def tuned(name: str, micro: int, tile_batch: int | None) -> Any:
        training = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
        return stage(
            data, tmp_path / name, tile_batch, stage="pft", model={"checkpoint": str(start)},
            training={**training, "save_steps": 1}, trainable={"vision": lora, "projector": "full", "language": lora},
        )  # fmt: skip

    straight = run_stage_here(tuned("straight", 8, None))
    stop_at_step(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run_stage_here(tuned("broken", 4, chunks))
    pairs = zip(read_metrics(straight), read_metrics(run_stage_here(tuned("broken", 4, chunks))), strict=True)
    for one, other in pairs:
        assert one["sample_checksum"] == other["sample_checksum"]
        for key in ("loss", "lm_loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
    merged, before = (load_file(folder / "model.safetensors") for folder in (straight, start))
    newline = "model.multi_modal_projector.image_newline"
    assert (newline in merged) == (kind is tiled_model)
    assert newline not in merged or not torch.equal(merged[newline], before[newline])
    assert any("vision_tower" in name and not torch.equal(merged[name], before[name]) for name in before)
