"""A bias-balanced router in a stage: its bias is what the logged loads of each step say. It survives a kill, and
another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_kit import run_stage_here, stop_at_step
from safetensors.torch import load_file
from stage_kit import read_metrics, stage_config, tiny_moe, write_data
from zero_grid import Grid

STEPS = 4


def _stage(folder: Path, data: Path, zero: str | None = None, **training: Any) -> dict[str, Any]:
    layer = {"num_experts": 4, "num_experts_per_tok": 2, "router": "bias_balanced"}
    moe = tiny_moe(vision=layer, projector=layer, language=layer)
    settings = {"max_steps": STEPS, "logging_steps": 1, "gradient_accumulation_steps": 2, "save_steps": 2, **training}
    return stage_config("sft", data, folder, moe=moe, training=settings, deepspeed=zero)


def _biases(directory: Path) -> dict[str, list[int]]:
    weights = load_file(directory / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in weights.items() if name.endswith("router.bias_steps")}


def _moves(records: list[dict[str, Any]]) -> dict[str, list[int]]:
    """By layer, what steps with these records add to its bias."""
    layers = [key.removeprefix("expert_load/") for key in records[0] if key.startswith("expert_load/")]
    expected = {}
    for layer in layers:
        loads = torch.tensor([record[f"expert_load/{layer}"] for record in records], dtype=torch.float64)
        # Shares of one step's choices; an expert with exactly the mean load moves by nothing.
        moves = torch.where((loads - 0.25).abs() < 1e-6, 0, torch.sign(0.25 - loads))
        assert moves.any(), layer
        expected[layer] = moves.sum(0).tolist()
    return expected


def test_the_bias_is_the_sum_of_the_steps_signs_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", rows=48)
    whole = run_stage_here(_stage(tmp_path / "whole", data))
    records = [record for record in read_metrics(whole) if "expert_load/language.0" in record]
    assert len(records) == STEPS
    expected = _moves(records)
    found = _biases(whole)
    assert found["model.language_model.layers.0.mlp.router.bias_steps"] == expected["language.0"]
    assert sorted(found.values()) == sorted(expected.values())
    assert len(found) > 2

    killed = _stage(tmp_path / "killed", data)
    with monkeypatch.context() as patched:
        stop_at_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage_here(killed)
    assert _biases(run_stage_here(killed)) == found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bias_survives_another_number_of_ranks(tmp_path: Path) -> None:
    """Which DeepSpeed's universal checkpoints, of parameters alone, would set to 0."""
    data, grid, zeros = write_data(tmp_path / "data", rows=48), Grid(tmp_path), ("zero2", "zero3")

    def run(ranks: int, *stages: dict[str, Any]) -> None:
        todo = tmp_path / "todo.json"
        todo.write_text(json.dumps(stages), encoding="utf-8")
        said = grid._launch(ranks, ["--starts", str(todo)])
        for stage in stages:
            assert Path(stage["output_dir"], "model.safetensors").is_file(), said

    micro = "per_device_train_batch_size"
    run(2, *(_stage(tmp_path / zero, data, zero, **{micro: 2}) for zero in zeros))
    for zero in zeros:
        shutil.copytree(tmp_path / zero / "checkpoint-2", tmp_path / f"{zero} alone" / "checkpoint-2")
    run(1, *(_stage(tmp_path / f"{zero} alone", data, zero, **{micro: 4}) for zero in zeros))
    for zero in zeros:
        alone, layer = tmp_path / f"{zero} alone", "model.language_model.layers.0.mlp.router.bias_steps"
        records = read_metrics(alone)
        assert [record["step"] for record in records] == [3, 4]
        begun, ended = _biases(alone / "checkpoint-2")[layer], _biases(alone)[layer]
        assert any(begun)
        assert ended == [a + b for a, b in zip(begun, _moves(records)["language.0"], strict=True)], zero
