"""A stage whose experts' running means answer: the means follow the steps, survive a kill, and are no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import run_stage_here, stop_at_step
from safetensors.torch import load_file
from stage_kit import stage_config, tiny_moe, write_data

from llava_compete.train.callbacks.answer_means import FILE

pytestmark = pytest.mark.slow


def _stage(folder: Path, data: Path, **training: Any) -> dict[str, Any]:
    layer = {"num_experts": 4, "num_experts_per_tok": 2, "competition_judge": "loss"}
    parts = {
        "projector": {**layer, "competition_answers": "both"},
        "language": {**layer, "competition_answers": "mean"},
    }
    settings = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2, "save_steps": 2, **training}
    return stage_config("sft", data, folder, moe=tiny_moe(vision=None, **parts), training=settings, deepspeed=None)


def _means(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"checkpoint-{step}" / FILE)


def test_means_follow_the_steps_and_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", rows=48)
    whole = run_stage_here(_stage(tmp_path / "whole", data))
    first, last = _means(whole, 2), _means(whole, 4)
    assert {name.rpartition(".")[0] for name in last} == {"projector.0", "language.0", "language.1"}
    assert last["language.1.mean"].shape == (4, 32)
    assert all(last[name].any() for name in last)
    assert not torch.equal(first["language.1.mean"], last["language.1.mean"])
    assert not (whole / FILE).exists(), "no part of the stage's result"
    assert not any("mean" in name for name in load_file(whole / "model.safetensors"))

    killed = _stage(tmp_path / "killed", data)
    with monkeypatch.context() as patched:
        stop_at_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage_here(killed)
    again = run_stage_here(killed)
    for found, expected in ((_means(again, 4), last), *((load_file(d / "model.safetensors") for d in (again, whole)),)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
