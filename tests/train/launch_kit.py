"""Real ranks on CPU for the tests of whole stages: starting, watching and comparing them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
from stage_kit import (
    ROOT,
    read_metrics,
    run_stage,
    stage_config,
    stage_environment,
    tiny_moe,
)

from llava_compete.config import dump_yaml

TOLERANCE = 1e-4


def launch_config(data: Path, out: Path, micro: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    training = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        **changes.pop("training", {}),
    }
    stage = changes.pop("stage", "sft")
    moe = {"moe": tiny_moe()} if stage == "sft" else {}
    return stage_config(stage, data, out, training=training, **moe, **changes)


def train_launched(
    data: Path, folder: Path, name: str, micro: int, accumulation: int, processes: int = 2, **changes: Any
) -> Path:
    config = launch_config(data, folder / name, micro, accumulation, **changes)
    result = run_stage(config, folder / f"{name}.yaml", processes=processes, timeout=900)
    assert result.returncode == 0, result.stderr
    return folder / name


def assert_same_curve(left: Path, right: Path) -> None:
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


class started:  # noqa: N801 (reads as a verb in `with`)
    """A stage's script running in the background, ended with everything under it."""

    def __init__(
        self,
        config: dict[str, Any],
        path: Path,
        processes: int = 2,
        stderr: IO[bytes] | None = None,
        **environment: str,
    ) -> None:
        dump_yaml(config, path)
        self.command = ["bash", str(ROOT / "scripts" / f"{config['stage']}.sh"), str(path)]
        self.environment, self.stderr = {**os.environ, **stage_environment(processes), **environment}, stderr

    def __enter__(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            self.command, env=self.environment, stderr=self.stderr, start_new_session=True, preexec_fn=hear_signals
        )
        return self.process

    def __exit__(self, *_: object) -> None:
        for process in below(self.process.pid):
            process.kill()
        self.process.kill()
        self.process.wait()


def hear_signals() -> None:
    """In a child: tests that run behind `nohup` or a script's `&` would pass their ignored signals on to it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_worker(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Two ranks of a script of this folder, under torchrun."""
    worker = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    environment = {**os.environ, **stage_environment(2), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; empty where it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def rank_of(process: psutil.Process) -> int | None:
    """None where it is no rank, or has ended meanwhile."""
    try:
        rank = process.environ().get("RANK")
    except psutil.NoSuchProcess:
        return None
    return None if rank is None else int(rank)


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = {child: rank for child in below(process.pid) if (rank := rank_of(child)) is not None}
    return sorted(found, key=found.__getitem__)


def wait_for_step(process: subprocess.Popen[bytes], output_dir: Path, step: int) -> None:
    metrics = output_dir / "run" / "metrics.jsonl"
    wait_until(process, lambda: metrics.is_file() and len(read_metrics(output_dir)) >= step)


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool], limit: float = 600) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        assert process.poll() is None, "the run ended too early"
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError(f"not reached in {limit} s")


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]
