"""Stages through the user's own scripts: launchers, ZeRO stages, several processes, and what goes wrong with them.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
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
    stage = changes.pop("stage", "sft")
    moe = {"moe": tiny_moe()} if stage == "sft" else {}
    return stage_config(stage, data, out, training=training, **moe, **changes)


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
    losses = {key for record, _ in pairs for key in record if key.endswith("_loss")}
    for key in ("loss", "grad_norm", *losses):
        assert [key in one for one, _ in pairs] == [key in other for _, other in pairs]
        curves = [(one[key], other[key]) for one, other in pairs if key in one]
        # Single terms of a small competition jump by about 1e-8 where a tie falls the other way.
        floor = 1e-6 if key in ("loss", "grad_norm", "lm_loss") or key.endswith("aux_loss") else 1e-2
        differences = [abs(one - other) / max(abs(one), floor) for one, other in curves]
        assert max(differences) <= TOLERANCE, (key, differences)
        assert sum(differences) / len(differences) <= TOLERANCE
    for key in ("sample_checksum", "competition_layers"):
        assert [one[key] for one, _ in pairs] == [other[key] for _, other in pairs]


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
    _assert_same_curve(reference, _train(data, tmp_path, "out", micro, accumulation, **changes))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", ["pretrain_align", "sft"])
def test_resume_after_kill_equals_straight(data: Path, tmp_path: Path, zero: str, stage: str) -> None:
    saving: dict[str, Any] = {"stage": stage, "training": {"save_steps": 3}, "deepspeed": zero}
    if stage == "pretrain_align":
        saving["trainable"] = {"projector": "full"}
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
        errors = _errors(result)  # of one rank or of both: each writes its shard
        assert errors
        for error in errors:
            assert f"the disk is full (0 MiB free), checkpoint-{len(complete) + 1} was not written" in error
        for path in complete[:-1]:
            shutil.rmtree(path)
        again = run_stage(config, tmp_path / "c.yaml", "training.save_total_limit=1")
        assert again.returncode == 0, again.stderr
        _assert_same_curve(reference, disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("zero", "before", "after"), [("zero2", 2, 1), ("zero3", 2, 1), ("zero2", 1, 2), ("zero3", 1, 2)]
)
def test_resume_on_another_number_of_ranks(
    data: Path, tmp_path: Path, reference: Path, zero: str, before: int, after: int
) -> None:
    config = _config(data, tmp_path / "out", 8 // before, 1, deepspeed=zero)
    with _started(config, tmp_path / "c.yaml", processes=before) as process:
        _wait_for_step(process, tmp_path / "out", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert checkpoints.read_finished(tmp_path / "out") is None
    _assert_same_curve(reference, _train(data, tmp_path, "out", 8 // after, 1, processes=after, deepspeed=zero))


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_lora_under_zero_equals_one_process(data: Path, tmp_path: Path, zero: str) -> None:
    one_step = {"training": {"max_steps": 1}, "deepspeed": None}
    start = _train(data, tmp_path, "start", 8, 1, processes=1, stage="pretrain_align", **one_step)

    def tuned(name: str, micro: int, processes: int, deepspeed: str | None) -> Path:
        lora = {"projector": "full", "language": {"mode": "lora", "lora_rank": 2}}
        changes = {"stage": "pft", "model": {"checkpoint": str(start)}, "trainable": lora, "deepspeed": deepspeed}
        return _train(data, tmp_path, name, micro, 1, processes=processes, **changes)

    alone, sharded = tuned("alone", 8, 1, None), tuned("sharded", 4, 2, zero)
    _assert_same_curve(alone, sharded)
    merged = [load_file(folder / "model.safetensors") for folder in (alone, sharded)]
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[0].items():
        torch.testing.assert_close(merged[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_held_out_loss_and_answers_under_zero3(data: Path, tmp_path: Path) -> None:
    def run(name: str, micro: int, processes: int, deepspeed: str | None) -> list[dict[str, Any]]:
        training = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
        config = _config(data, tmp_path / name, micro, 1, training=training, sample_steps=3, deepspeed=deepspeed)
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
        config = _config(data, tmp_path / name, 4, 1, stage=stage, **changes)
        dump_yaml(config, tmp_path / f"{name}.yaml")
        return _run_worker("nan_worker.py", tmp_path / f"{name}.yaml", 3, last)

    # One of steps 3 and 4 may be all text, which has no pixels to poison.
    skipped = run("skipped", last=4, allowed=2)
    assert skipped.returncode == 0, skipped.stderr[-3000:]
    losses = [record["loss"] for record in read_metrics(tmp_path / "skipped")]
    assert [loss is not None for loss in losses].count(False) == skipped.stderr.count("skipped, not finite: layer") > 0
    assert None not in (*losses[:2], *losses[4:])

    stopped = run("stopped", last=6, allowed=1)
    assert stopped.returncode != 0
    (error,) = _errors(stopped)
    layer = "vision.0" if stage == "sft" else r"vision_tower\.\S+"
    assert re.search(rf"step \d: not finite: layer {layer}, .*lm_loss.*; stopped after 2 such steps in a row", error)
    for checkpoint in (*checkpoints.list_complete(tmp_path / "stopped"), tmp_path / "skipped"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_a_changed_tower_is_saved_bit_for_bit(data: Path, tmp_path: Path, deepspeed: str | None) -> None:
    out = tmp_path / "out"
    dump_yaml(_config(data, out, 4, 1, training={"max_steps": 2}, deepspeed=deepspeed), tmp_path / "c.yaml")
    done = _run_worker("save_worker.py", tmp_path / "c.yaml")
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
        everything, ranks = _below(process.pid), _ranks(process)
        assert len(ranks) == 2
        ranks[1].kill()
        assert process.wait(timeout=60) != 0
        assert not _running(everything)


def test_an_error_of_one_rank_is_said_once_and_ends_all(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", rows=48)
    (tmp_path / "data" / "images" / "17.png").write_bytes(b"no image")
    config = _config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    said = tmp_path / "stderr"
    with said.open("wb") as file, _started(config, tmp_path / "c.yaml", stderr=file) as process:
        _wait_until(process, lambda: len(_ranks(process)) == 2)
        everything = _below(process.pid)
        _wait_until(process, lambda: "error:" in said.read_text(encoding="utf-8"))
        assert process.wait(timeout=60) != 0
        assert not _running(everything)
    (error,) = [line for line in said.read_text(encoding="utf-8").splitlines() if "error:" in line]
    assert re.match(r"error: (rank 1: )?row tiny/row17: .*17\.png", error)


@pytest.mark.parametrize("told", ["script", "group", "everything"])
def test_sigterm_saves(data: Path, tmp_path: Path, told: str) -> None:
    """As `kill` sends it, a terminal (to the process group), and systemd or scancel (to all processes)."""
    config = _config(data, tmp_path / "out", 1, 1, training={"max_steps": 2000})
    with _started(config, tmp_path / "c.yaml") as process:
        _wait_for_step(process, tmp_path / "out", 2)
        everything = _below(process.pid)
        if told == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            for one in [process, *(everything if told == "everything" else [])]:
                one.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
        assert not _running(everything)
    assert checkpoints.list_complete(tmp_path / "out")
    assert checkpoints.read_finished(tmp_path / "out") is None


def test_train_all_runs_what_is_left(data: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    dense, moe = {"checkpoint": str(tmp_path / "dense")}, {"checkpoint": str(tmp_path / "moe")}
    first = stage_config("pretrain_align", data, tmp_path / "dense", training={"max_steps": 2}, deepspeed=None)
    dump_yaml(first, configs / "pretrain_align.yaml")
    upcycled = {"stage": "upcycle", "model": dense, "output_dir": str(tmp_path / "moe"), "moe": tiny_moe()}
    dump_yaml(upcycled, configs / "upcycle.yaml")
    last = stage_config("sft", data, tmp_path / "sft", model=moe, training={"max_steps": 2000}, deepspeed=None)
    dump_yaml(last, configs / "sft.yaml")
    command = ["bash", str(ROOT / "scripts" / "train_all.sh"), str(configs)]
    with subprocess.Popen(command, env={**os.environ, **stage_environment(1)}) as process:
        _wait_for_step(process, tmp_path / "sft", 2)
        everything = _below(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
        assert not _running(everything)
    weights = [tmp_path / stage / "model.safetensors" for stage in ("dense", "moe")]
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

    def __init__(self, config: dict[str, Any], path: Path, processes: int = 2, stderr: IO[bytes] | None = None) -> None:
        dump_yaml(config, path)
        self.command = ["bash", str(ROOT / "scripts" / f"{config['stage']}.sh"), str(path)]
        self.environment, self.stderr = {**os.environ, **stage_environment(processes)}, stderr

    def __enter__(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self.command, env=self.environment, stderr=self.stderr, start_new_session=True)
        return self.process

    def __exit__(self, *_: object) -> None:
        for process in _below(self.process.pid):
            process.kill()
        self.process.kill()
        self.process.wait()


def _run_worker(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Two ranks of a script of this folder, under torchrun."""
    worker = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = {**os.environ, **stage_environment(2), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


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
