"""Which launcher a stage script starts, on how many devices: the real script, with launchers that only print."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stage_kit import ROOT

LAUNCHERS = ("deepspeed", "torchrun")
OURS = ("NUM_GPUS", "NUM_PROCESSES", "HOSTFILE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An installed environment, to the scripts' eyes, on a machine with 4 GPUs."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    for name in LAUNCHERS:
        _script(folder / "bin" / name, f'echo {name} "$@"; echo "devices=${{CUDA_VISIBLE_DEVICES-all}}"')
    _script(folder / "bin" / "nvidia-smi", 'for n in 0 1 2 3; do echo "GPU $n: H100"; done')
    stamp = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    (folder / ".installed").write_text(hashlib.sha256(stamp).hexdigest() + "\n", encoding="utf-8")
    return folder


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def _launch(venv: Path, *arguments: str, **environment: str) -> tuple[str, str]:
    """What was started, and the devices that it sees."""
    inherited = {key: value for key, value in os.environ.items() if key not in (*OURS, "CUDA_VISIBLE_DEVICES")}
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sft.sh"), *arguments],
        env={**inherited, "PATH": path, "VENV": str(venv), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command, devices = done.stdout.splitlines()
    return command, devices.removeprefix("devices=")


@pytest.mark.parametrize(
    ("environment", "options", "devices"),
    [
        ({}, "deepspeed --num_gpus 4 ", "all"),
        ({"NUM_GPUS": "2"}, "deepspeed --num_gpus 2 ", "all"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "deepspeed --include localhost:2,3 ", "2,3"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "1"}, "deepspeed --include localhost:2 ", "2,3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "deepspeed --num_gpus 2 ", ""),
        ({"NUM_GPUS": "0", "NUM_PROCESSES": "3"}, "deepspeed --num_gpus 3 ", ""),
        ({"HOSTFILE": "hosts"}, "deepspeed --hostfile hosts ", "all"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr a --master_port 29500 ",
            "all",
        ),
    ],
    ids=str,
)
def test_launcher_and_devices(venv: Path, environment: dict[str, str], options: str, devices: str) -> None:
    command, seen = _launch(venv, "my.yaml", "training.max_steps=3", **environment)
    assert command.startswith(options)
    assert command.endswith("--module llava_compete.cli train my.yaml --stage sft training.max_steps=3")
    assert seen == devices


def test_the_demo_is_the_default_config(venv: Path) -> None:
    command, _ = _launch(venv, "seed=1")
    assert command.endswith("train configs/demo/sft.yaml --stage sft seed=1")


def test_train_all_is_for_one_launching_machine(tmp_path: Path) -> None:
    for words, environment, message in (
        ([], {}, "expected a directory with stage YAMLs, found 'nothing'"),
        ([str(tmp_path)], {}, "no pretrain_align.yaml, pft.yaml, upcycle.yaml or sft.yaml"),
        ([str(tmp_path)], {"NNODES": "2"}, "NNODES=2: run the stage scripts one by one on each machine"),
    ):
        command = ["bash", str(ROOT / "scripts" / "train_all.sh"), *words]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
