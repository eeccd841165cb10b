"""What goes wrong with a stage, through the user's own scripts: it ends with a message, and the last checkpoint stays.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from launch_kit import (
    assert_same_curve,
    below,
    error_lines,
    launch_config,
    ranks_of,
    run_worker,
    running,
    started,
    wait_for_step,
    wait_until,
)
from safetensors.torch import load_file
from stage_kit import (
    read_metrics,
    run_script,
    run_stage,
    write_data,
)

from llava_compete.config import dump_yaml
from llava_compete.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_full_disk_keeps_the_last_checkpoint(data: Path, tmp_path: Path, reference: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        config = launch_config(data, disk / "out", 4, 1, training={"save_steps": 1})
        result = run_stage(config, tmp_path / "c.yaml")
        assert result.returncode == 2
        complete = checkpoints.list_complete(disk / "out")
        assert 0 < len(complete) < 6
        errors = error_lines(result)  # of one rank or of both: each writes its shard
        assert errors
        for error in errors:
            assert f"the disk is full (0 MiB free), checkpoint-{len(complete) + 1} was not written" in error
        for path in complete[:-1]:
            shutil.rmtree(path)
        again = run_stage(config, tmp_path / "c.yaml", "training.save_total_limit=1")
        assert again.returncode == 0, again.stderr
        assert_same_curve(reference, disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("stage", "deepspeed", "bf16"),
    [
        ("sft", None, False),
        ("sft", "zero1", False),
        ("sft", "zero2", False),
        ("sft", "zero3", False),
        ("sft", "zero2", True),
        ("pretrain_align", None, False),
        ("pretrain_align", "zero3", False),
    ],
)
def test_non_finite_steps_of_one_rank_are_skipped(
    data: Path, tmp_path: Path, stage: str, deepspeed: str | None, bf16: bool
) -> None:
    def run(name: str, last: int, allowed: int) -> subprocess.CompletedProcess[str]:
        training, guards = {"save_steps": 1, "bf16": bf16}, {"max_bad_steps": allowed}
        changes = {"training": training, "deepspeed": deepspeed, "guards": guards}
        config = launch_config(data, tmp_path / name, 4, 1, stage=stage, **changes)
        dump_yaml(config, tmp_path / f"{name}.yaml")
        return run_worker("nan_worker.py", tmp_path / f"{name}.yaml", 3, last)

    # One of steps 3 and 4 may be all text, which has no pixels to poison.
    skipped = run("skipped", last=4, allowed=2)
    assert skipped.returncode == 0, skipped.stderr[-3000:]
    losses = [record["loss"] for record in read_metrics(tmp_path / "skipped")]
    assert [loss is not None for loss in losses].count(False) == skipped.stderr.count("skipped, not finite: layer") > 0
    assert None not in (*losses[:2], *losses[4:])

    stopped = run("stopped", last=6, allowed=1)
    assert stopped.returncode != 0
    (error,) = error_lines(stopped)
    layer = "vision.0" if stage == "sft" else r"model\.vision_tower\.\S+"
    assert re.search(rf"step \d: not finite: layer {layer}, .*lm_loss.*; stopped after 2 such steps in a row", error)
    for checkpoint in (*checkpoints.list_complete(tmp_path / "stopped"), tmp_path / "skipped"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_gradient_that_breaks_in_the_backward_alone_names_its_layer(
    data: Path, tmp_path: Path, deepspeed: str | None
) -> None:
    dump_yaml(launch_config(data, tmp_path / "out", 4, 1, deepspeed=deepspeed), tmp_path / "c.yaml")
    stopped = run_worker("nan_worker.py", tmp_path / "c.yaml")
    assert stopped.returncode != 0
    (error,) = error_lines(stopped)
    layer = "" if deepspeed == "zero3" else r", the gradient at the output of layer \S+layers\.1\.self_attn\.o_proj"
    assert re.search(rf"step \d: not finite: the gradient norm{layer}; stopped after", error)


def test_a_rank_that_dies_ends_all(data: Path, tmp_path: Path) -> None:
    config = launch_config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with started(config, tmp_path / "c.yaml") as process:
        wait_for_step(process, tmp_path / "out", 2)
        everything, ranks = below(process.pid), ranks_of(process)
        assert len(ranks) == 2
        ranks[1].kill()
        assert process.wait(timeout=60) != 0
        assert not running(everything)


def test_an_error_of_one_rank_is_said_once_and_ends_all(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", rows=48)
    (tmp_path / "data" / "images" / "17.png").write_bytes(b"no image")
    config = launch_config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    said = tmp_path / "stderr"
    with said.open("wb") as file, started(config, tmp_path / "c.yaml", stderr=file) as process:
        wait_until(process, lambda: len(ranks_of(process)) == 2)
        everything = below(process.pid)
        wait_until(process, lambda: "error:" in said.read_text(encoding="utf-8"))
        assert process.wait(timeout=60) != 0
        assert not running(everything)
    (error,) = [line for line in said.read_text(encoding="utf-8").splitlines() if "error:" in line]
    assert re.match(r"error: (rank 1: )?row tiny/row17: .*17\.png", error)


def test_second_run_on_one_directory_is_refused(data: Path, tmp_path: Path) -> None:
    config = launch_config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with started(config, tmp_path / "c.yaml") as process:
        wait_for_step(process, tmp_path / "out", 1)
        second = run_script("sft", tmp_path / "c.yaml")
        assert second.returncode != 0
        assert error_lines(second) == [line for line in error_lines(second) if "another run is writing here" in line]
        assert len(error_lines(second)) == 1
        process.terminate()
        process.wait(timeout=120)


def test_mistakes_end_with_one_line(data: Path, tmp_path: Path) -> None:
    config = launch_config(data, tmp_path / "out", 4, 1)
    missing = run_stage(config, tmp_path / "c.yaml", "data.sources=[{name: x, path: /no/such.json}]")
    assert missing.returncode != 0
    assert error_lines(missing) == ["error: /no/such.json: no such file"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        busy = run_script("sft", tmp_path / "c.yaml", MASTER_PORT=port)
    assert busy.returncode != 0
    assert len(error_lines(busy)) == 1
    assert f"port in use: 127.0.0.1:{port}" in error_lines(busy)[0]
    unknown = run_script("sft", tmp_path / "c.yaml", "sed=1")
    assert unknown.returncode == 2
    assert error_lines(unknown) == [f"error: {tmp_path / 'c.yaml'}: unknown key 'sed'; did you mean 'seed'?"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, data: Path) -> None:
    dump_yaml(launch_config(data, tmp_path / "out", 4, 1), tmp_path / "c.yaml")
    for environment in ({"NUM_GPUS": "2"}, {"NUM_GPUS": "1", "CUDA_VISIBLE_DEVICES": "GPU-3f2a1b"}):
        refused = run_script("sft", tmp_path / "c.yaml", **environment)
        assert refused.returncode == 2
        (error,) = error_lines(refused)
        assert f"NUM_GPUS is {environment['NUM_GPUS']}, found no usable GPU" in error
        assert not (tmp_path / "out").exists()
