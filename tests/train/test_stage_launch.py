"""Stages through the user's own scripts: launchers, ZeRO stages and several processes equal one process.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_kit import TOLERANCE, assert_same_curve, launch_config, run_worker, train_launched
from safetensors.torch import load_file
from stage_kit import (
    ROOT,
    fresh_model,
    read_metrics,
    run_stage,
    stage_environment,
)

from llava_compete.config import dump_yaml
from llava_compete.model.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


# In one of the 6 steps of 2 x 4 x 1, one rank has text only, the other images (tested in test_stage_pieces.py).
@pytest.mark.parametrize(
    ("micro", "accumulation", "changes"),
    [
        (4, 1, {"deepspeed": None}),
        (4, 1, {"deepspeed": "zero1"}),
        (4, 1, {"deepspeed": "zero2"}),
        (2, 2, {"deepspeed": "zero2"}),
        (1, 4, {"deepspeed": "zero2_offload"}),
        (4, 1, {"deepspeed": "zero3"}),
        (2, 2, {"deepspeed": "zero3_offload"}),
        (2, 2, {"deepspeed": "zero3", "training": {"activation_checkpointing": True}}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_two_processes_equal_one(
    data: Path, tmp_path: Path, reference: Path, micro: int, accumulation: int, changes: dict[str, Any]
) -> None:
    assert_same_curve(reference, train_launched(data, tmp_path, "out", micro, accumulation, **changes))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_schedule_with_a_lowest_rate_under_zero(data: Path, tmp_path: Path, zero: str) -> None:
    training = {"max_steps": 2, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.005}}
    out = train_launched(data, tmp_path, "out", 8, 1, processes=1, deepspeed=zero, training=training)
    assert [line["learning_rate"] for line in read_metrics(out)] == pytest.approx([0.01, 0.0075])


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_convolutional_tower_under_zero_equals_one_process(data: Path, tmp_path: Path, zero: str) -> None:
    tower = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_efficientnet", "image_size": 32}}
    changes: dict[str, Any] = {"model": {**fresh_model(), "vision_tower": {"config": tower}}, "stage": "pft"}
    # Adam would divide gradients of this untrained network that are hardly more than rounding by their own size.
    training: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
    alone = train_launched(data, tmp_path, "alone", 8, 1, processes=1, **changes, deepspeed=None, training=training)
    training |= {"activation_checkpointing": True}
    sharded = train_launched(data, tmp_path, "sharded", 2, 2, **changes, deepspeed=zero, training=training)
    assert_same_curve(alone, sharded)
    for name, buffer in load_checkpoint(sharded)[0].named_buffers():
        if name.endswith("running_var"):
            assert torch.equal(buffer, torch.ones_like(buffer)), name


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_lora_under_zero_equals_one_process(data: Path, tmp_path: Path, zero: str) -> None:
    one_step = {"training": {"max_steps": 1}, "deepspeed": None}
    start = train_launched(data, tmp_path, "start", 8, 1, processes=1, stage="pretrain_align", **one_step)

    def tuned(name: str, micro: int, processes: int, deepspeed: str | None) -> Path:
        lora = {"projector": "full", "language": {"mode": "lora", "lora_rank": 2}}
        changes = {"stage": "pft", "model": {"checkpoint": str(start)}, "trainable": lora, "deepspeed": deepspeed}
        return train_launched(data, tmp_path, name, micro, 1, processes=processes, **changes)

    alone, sharded = tuned("alone", 8, 1, None), tuned("sharded", 4, 2, zero)
    assert_same_curve(alone, sharded)
    merged = [load_file(folder / "model.safetensors") for folder in (alone, sharded)]
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_held_out_loss_and_answers_under_zero3(data: Path, tmp_path: Path) -> None:
    def run(name: str, micro: int, processes: int, deepspeed: str | None) -> list[dict[str, Any]]:
        training = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
        config = launch_config(data, tmp_path / name, micro, 1, training=training, sample_steps=3, deepspeed=deepspeed)
        config["data"]["validation_fraction"] = 0.3
        result = run_stage(config, tmp_path / f"{name}.yaml", processes=processes, timeout=900)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        answers = (tmp_path / name / "run" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in answers] == [3, 3, 3, 6, 6, 6]
        return [record for record in map(json.loads, lines) if "eval_loss" in record]

    alone, sharded = run("alone", 8, 1, None), run("sharded", 4, 2, "zero3")
    assert len(alone) == len(sharded) == 3
    for one, other in zip(alone, sharded, strict=True):
        assert one["eval_tokens"] == other["eval_tokens"] > 0
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=TOLERANCE)


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_changed_tower_is_saved_bit_for_bit(data: Path, tmp_path: Path, deepspeed: str | None) -> None:
    out = tmp_path / "out"
    dump_yaml(launch_config(data, out, 4, 1, training={"max_steps": 2}, deepspeed=deepspeed), tmp_path / "c.yaml")
    done = run_worker("save_worker.py", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.load(out.with_suffix(".pt"), weights_only=True)
    first, second = (dict(load_checkpoint(folder)[0].named_parameters()) for folder in (tmp_path / "out-first", out))
    assert first.keys() == second.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(second[name], parameter), name
        assert torch.equal(first[name], parameter) != name.startswith("model.vision_tower."), name


def test_two_launchers_are_two_nodes(data: Path, tmp_path: Path, reference: Path) -> None:
    dump_yaml(launch_config(data, tmp_path / "out", 4, 1), tmp_path / "c.yaml")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "sft.sh"), str(tmp_path / "c.yaml")],
            env={
                **os.environ,
                **stage_environment(1),
                "NNODES": "2",
                "NODE_RANK": str(node),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for node in range(2)
    ]
    assert [node.wait(timeout=900) for node in nodes] == [0, 0]
    assert_same_curve(reference, tmp_path / "out")
