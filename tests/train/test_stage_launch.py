"""Stages through the user's own scripts: launchers, ZeRO stages, several processes, and what goes wrong with them.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from stage_kit import (
    ROOT,
    read_metrics,
    run_script,
    run_stage,
    stage_config,
    stage_environment,
    tiny_moe,
    write_data,
)

from llava_compete.config import dump_yaml
from llava_compete.model.checkpoint import load_checkpoint
from llava_compete.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WATCHED = ("loss", "lm_loss", "grad_norm", "language/aux_loss", "vision/aux_loss", "projector/aux_loss")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), rows=48)


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no DeepSpeed, 8 rows at once."""
    folder = tmp_path_factory.mktemp("reference")
    return _train(data, folder, "reference", 8, 1, processes=1, deepspeed=None)


def _config(data: Path, out: Path, micro: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    training = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        **changes.pop("training", {}),
    }
    return stage_config("sft", data, out, training=training, moe=tiny_moe(), **changes)


def _train(
    data: Path, folder: Path, name: str, micro: int, accumulation: int, processes: int = 2, **changes: Any
) -> Path:
    config = _config(data, folder / name, micro, accumulation, **changes)
    result = run_stage(config, folder / f"{name}.yaml", processes=processes, timeout=900)
    assert result.returncode == 0, result.stderr
    return folder / name


def _assert_same_curve(left: Path, right: Path) -> None:
    pairs = list(zip(read_metrics(left), read_metrics(right), strict=True))
    assert len(pairs) == 6
    for key in WATCHED:
        differences = [abs(one[key] - other[key]) / max(abs(one[key]), 1e-6) for one, other in pairs]
        assert max(differences) <= TOLERANCE, (key, differences)
        assert sum(differences) / len(differences) <= TOLERANCE
    for key in ("sample_checksum", "competition_layers"):
        assert [one[key] for one, _ in pairs] == [other[key] for _, other in pairs]


# Sorted by modality, global batches of one kind come whole: some ranks see text only, some images only.
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
    _assert_same_curve(reference, _train(data, tmp_path, "out", micro, accumulation, **changes))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resume_after_kill_equals_straight(data: Path, tmp_path: Path, zero: str) -> None:
    saving = {"training": {"save_steps": 3}, "deepspeed": zero}
    straight = _train(data, tmp_path, "straight", 2, 2, **saving)
    config = _config(data, tmp_path / "killed", 2, 2, **saving)
    with _started(config, tmp_path / "killed.yaml") as process:
        _wait_for_step(process, tmp_path / "killed", 4)
        for rank in _ranks(process):
            rank.kill()
        assert process.wait(timeout=60) != 0
    assert checkpoints.list_complete(tmp_path / "killed")[-1].name == "checkpoint-3"
    _assert_same_curve(straight, _train(data, tmp_path, "killed", 2, 2, **saving))


def test_resume_after_kill_during_a_save_equals_straight(data: Path, tmp_path: Path, reference: Path) -> None:
    config = _config(data, tmp_path / "out", 4, 1, training={"save_steps": 2})
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_until(process, (tmp_path / "out" / checkpoints.STAGING / "checkpoint-4").is_dir)
        for rank in _ranks(process):
            rank.kill()
        process.wait(timeout=60)
    assert [path.name for path in checkpoints.list_complete(tmp_path / "out")] == ["checkpoint-2"]
    _assert_same_curve(reference, _train(data, tmp_path, "out", 4, 1, training={"save_steps": 2}))


def test_a_full_disk_keeps_the_last_checkpoint(data: Path, tmp_path: Path, reference: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        config = _config(data, disk / "out", 4, 1, training={"save_steps": 1})
        result = run_stage(config, tmp_path / "c.yaml")
        assert result.returncode == 2
        complete = checkpoints.list_complete(disk / "out")
        assert 0 < len(complete) < 6
        (error,) = _errors(result)
        assert f"the disk is full (0 MiB free), checkpoint-{len(complete) + 1} was not written" in error
        for path in complete[:-1]:
            shutil.rmtree(path)
        again = run_stage(config, tmp_path / "c.yaml", "training.save_total_limit=1")
        assert again.returncode == 0, again.stderr
        _assert_same_curve(reference, disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_resume_on_another_number_of_ranks(data: Path, tmp_path: Path, reference: Path, zero: str) -> None:
    config = _config(data, tmp_path / "out", 2, 2, training={"save_steps": 3}, deepspeed=zero)
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_for_step(process, tmp_path / "out", 4)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    _assert_same_curve(reference, _train(data, tmp_path, "out", 8, 1, processes=1, deepspeed=zero))


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_changed_tower_is_saved_bit_for_bit(data: Path, tmp_path: Path, deepspeed: str | None) -> None:
    out = tmp_path / "out"
    dump_yaml(_config(data, out, 4, 1, training={"max_steps": 2}, deepspeed=deepspeed), tmp_path / "c.yaml")
    worker = Path(__file__).with_name("save_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = {**os.environ, **stage_environment(2), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, tmp_path / "c.yaml"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.load(out.with_suffix(".pt"), weights_only=True)
    first, second = (dict(load_checkpoint(folder)[0].named_parameters()) for folder in (tmp_path / "out-first", out))
    assert first.keys() == second.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(second[name], parameter), name
        assert torch.equal(first[name], parameter) != name.startswith("vision_tower."), name


def test_a_rank_that_dies_ends_all(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_for_step(process, tmp_path / "out", 2)
        ranks = _ranks(process)
        assert len(ranks) == 2
        ranks[1].kill()
        assert process.wait(timeout=60) != 0
        assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_to_the_script_saves(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_for_step(process, tmp_path / "out", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert checkpoints.list_complete(tmp_path / "out")
    assert checkpoints.read_finished(tmp_path / "out") is None


def test_second_run_on_one_directory_is_refused(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_for_step(process, tmp_path / "out", 1)
        second = run_script("sft", tmp_path / "c.yaml")
        assert second.returncode != 0
        assert _errors(second) == [line for line in _errors(second) if "another run is writing here" in line]
        assert len(_errors(second)) == 1
        process.terminate()
        process.wait(timeout=120)


def test_mistakes_end_with_one_line(data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "out", 4, 1)
    missing = run_stage(config, tmp_path / "c.yaml", "data.sources=[{name: x, path: /no/such.json}]")
    assert missing.returncode != 0
    assert _errors(missing) == ["error: /no/such.json: no such file"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        busy = run_script("sft", tmp_path / "c.yaml", MASTER_PORT=port)
    assert busy.returncode != 0
    assert len(_errors(busy)) == 1
    assert f"port in use: 127.0.0.1:{port}" in _errors(busy)[0]


def test_two_launchers_are_two_nodes(data: Path, tmp_path: Path, reference: Path) -> None:
    dump_yaml(_config(data, tmp_path / "out", 4, 1), tmp_path / "c.yaml")
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
    _assert_same_curve(reference, tmp_path / "out")


class _started:  # noqa: N801 (reads as a verb in `with`)
    """A stage's script running in the background, ended with everything under it."""

    def __init__(self, config: dict[str, Any], path: Path) -> None:
        dump_yaml(config, path)
        self.command = ["bash", str(ROOT / "scripts" / f"{config['stage']}.sh"), str(path)]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self.command, env={**os.environ, **stage_environment(2)})
        return self.process

    def __exit__(self, *_: object) -> None:
        for process in _below(self.process.pid):
            process.kill()
        self.process.kill()
        self.process.wait()


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found: Iterator[psutil.Process] = (child for child in _below(process.pid) if "RANK" in child.environ())
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def _wait_for_step(process: subprocess.Popen[bytes], output_dir: Path, step: int) -> None:
    metrics = output_dir / "run" / "metrics.jsonl"
    _wait_until(process, lambda: metrics.is_file() and len(read_metrics(output_dir)) >= step)


def _wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool], limit: float = 600) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert process.poll() is None, "the run ended too early"
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError(f"not reached in {limit} s")


def _errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]
