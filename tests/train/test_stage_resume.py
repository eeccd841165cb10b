"""Stages that were stopped or killed go on where they were, through the user's own scripts.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launch_kit import (
    assert_same_curve,
    below,
    launch_config,
    ranks_of,
    running,
    started,
    train_launched,
    wait_for_step,
    wait_until,
)
from stage_kit import (
    ROOT,
    stage_config,
    stage_environment,
    tiny_moe,
)

from llava_compete.config import dump_yaml
from llava_compete.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["pretrain_align", "sft"])
def test_resume_after_kill_equals_straight(data: Path, tmp_path: Path, zero: str, stage: str) -> None:
    saving: dict[str, Any] = {"stage": stage, "training": {"save_steps": 3}, "deepspeed": zero}
    if stage == "pretrain_align":
        saving["trainable"] = {"projector": "full"}
    straight = train_launched(data, tmp_path, "straight", 2, 2, **saving)
    config = launch_config(data, tmp_path / "killed", 2, 2, **saving)
    with started(config, tmp_path / "killed.yaml") as process:
        wait_for_step(process, tmp_path / "killed", 4)
        for rank in ranks_of(process):
            rank.kill()
        assert process.wait(timeout=60) != 0
    assert checkpoints.list_complete(tmp_path / "killed")[-1].name == "checkpoint-3"
    assert_same_curve(straight, train_launched(data, tmp_path, "killed", 2, 2, **saving))


def test_resume_after_kill_during_a_save_equals_straight(data: Path, tmp_path: Path, reference: Path) -> None:
    config = launch_config(data, tmp_path / "out", 4, 1, training={"save_steps": 2})
    with started(config, tmp_path / "c.yaml") as process:
        wait_until(process, (tmp_path / "out" / checkpoints.STAGING / "checkpoint-4").is_dir)
        for rank in ranks_of(process):
            rank.kill()
        process.wait(timeout=60)
    assert [path.name for path in checkpoints.list_complete(tmp_path / "out")] == ["checkpoint-2"]
    assert_same_curve(reference, train_launched(data, tmp_path, "out", 4, 1, training={"save_steps": 2}))


@pytest.mark.parametrize(
    ("zero", "before", "after"), [("zero2", 2, 1), ("zero3", 2, 1), ("zero2", 1, 2), ("zero3", 1, 2)]
)
def test_resume_on_another_number_of_ranks(
    data: Path, tmp_path: Path, reference: Path, zero: str, before: int, after: int
) -> None:
    config = launch_config(data, tmp_path / "out", 8 // before, 1, deepspeed=zero)
    with started(config, tmp_path / "c.yaml", processes=before) as process:
        wait_for_step(process, tmp_path / "out", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert checkpoints.read_finished(tmp_path / "out") is None
    assert_same_curve(reference, train_launched(data, tmp_path, "out", 8 // after, 1, processes=after, deepspeed=zero))


def test_train_all_runs_what_is_left(data: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    # Longer than a line of YAML, so that its value stands on the next.
    moe_dir = tmp_path / "mixtures of experts, four in every layer of the language model and of the tower"
    dense, moe = {"checkpoint": str(tmp_path / "dense")}, {"checkpoint": str(moe_dir)}
    first = stage_config("pretrain_align", data, tmp_path / "dense", training={"max_steps": 2}, deepspeed=None)
    dump_yaml(first, configs / "pretrain_align.yaml")
    upcycled = {"stage": "upcycle", "model": dense, "output_dir": str(moe_dir), "moe": tiny_moe()}
    dump_yaml(upcycled, configs / "upcycle.yaml")
    last = stage_config("sft", data, tmp_path / "sft", model=moe, training={"max_steps": 2000}, deepspeed=None)
    dump_yaml(last, configs / "sft.yaml")
    command = ["bash", str(ROOT / "scripts" / "train_all.sh"), str(configs)]
    with subprocess.Popen(command, env={**os.environ, **stage_environment(1)}) as process:
        wait_for_step(process, tmp_path / "sft", 2)
        everything = below(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
        assert not running(everything)
    weights = [folder / "model.safetensors" for folder in (tmp_path / "dense", moe_dir)]
    before = [path.stat().st_mtime_ns for path in weights]
    (saved,) = checkpoints.list_complete(tmp_path / "sft")
    state = json.loads((saved / "trainer_state.json").read_text(encoding="utf-8"))
    dump_yaml({**last, "training": {**last["training"], "max_steps": state["global_step"] + 1}}, configs / "sft.yaml")
    again = subprocess.run(
        [*command, "--allow-changed"], env={**os.environ, **stage_environment(1)}, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "stage pretrain_align has finished already" in again.stderr
    assert "upcycled already" in again.stderr
    assert f"going on from {saved.name}" in again.stderr
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert checkpoints.read_finished(tmp_path / "sft") is not None
