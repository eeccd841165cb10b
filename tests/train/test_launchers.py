"""Which launcher a stage script starts, on how many devices: the real script, with launchers that only print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher_kit import OUR_TORCHRUN, environment_of, make_venv, write_script
from stage_kit import ROOT


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """On a machine with 4 GPUs."""
    says = 'echo "devices=${CUDA_VISIBLE_DEVICES-all} NUM_GPUS=$NUM_GPUS"'
    folder = make_venv(tmp_path / "venv", f'echo deepspeed "$@"; {says}', f'echo torchrun "$@"; {says}')
    write_script(folder / "bin" / "nvidia-smi", 'for n in 0 1 2 3; do echo "GPU $n: H100"; done')
    return folder


def _run(venv: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "sft.sh"), *arguments]
    return subprocess.run(command, env=environment_of(venv, **environment), capture_output=True, text=True, check=False)


def _launch(venv: Path, *arguments: str, **environment: str) -> tuple[str, str, str]:
    """What was started, the devices that it sees, and how many GPUs each rank is told to expect."""
    done = _run(venv, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    command, told = done.stdout.splitlines()
    devices, gpus = re.fullmatch(r"devices=(\S*) NUM_GPUS=(\S*)", told).groups()
    return command, devices, gpus


ONE_NODE = "torchrun --nnodes 1 --node_rank 0 --nproc_per_node {} --master_addr 127.0.0.1 --master_port "


@pytest.mark.parametrize(
    ("environment", "options", "devices", "gpus"),
    [
        ({}, "deepspeed --num_gpus 4 ", "all", "4"),
        ({"NUM_GPUS": "2"}, "deepspeed --num_gpus 2 ", "all", "2"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ONE_NODE.format(2), "2,3", "2"),
        ({"CUDA_VISIBLE_DEVICES": " 2, 3"}, ONE_NODE.format(2), "2,3", "2"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "1"}, ONE_NODE.format(1), "2", "1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3f2a1b,GPU-4e"}, ONE_NODE.format(2), "GPU-3f2a1b,GPU-4e", "2"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-377e,MIG-4", "NUM_GPUS": "1"}, ONE_NODE.format(1), "MIG-377e", "1"),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ONE_NODE.format(1), "1", "1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "deepspeed --num_gpus 2 ", "", "0"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "deepspeed --num_gpus 2 ", "", "0"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "deepspeed --num_gpus 2 ", "", "0"),
        ({"NUM_GPUS": "0", "NUM_PROCESSES": "3"}, "deepspeed --num_gpus 3 ", "", "0"),
        ({"NUM_GPUS": "0", "CUDA_VISIBLE_DEVICES": "GPU-3f2a1b"}, "deepspeed --num_gpus 2 ", "", "0"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr a --master_port 29500 ",
            "all",
            "4",
        ),
    ],
    ids=str,
)
def test_launcher_and_devices(venv: Path, environment: dict[str, str], options: str, devices: str, gpus: str) -> None:
    command, seen, expected = _launch(venv, "my.yaml", "training.max_steps=3", **environment)
    assert command.startswith(options)
    assert command.endswith("--module llava_compete.cli train my.yaml --stage sft training.max_steps=3")
    assert (seen, expected) == (devices, gpus)


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"NUM_GPUS": "abc"}, "NUM_GPUS=abc: expected a whole number, 0 or more"),
        ({"NUM_GPUS": "-1"}, "NUM_GPUS=-1: expected a whole number, 0 or more"),
        ({"NUM_GPUS": "0", "NUM_PROCESSES": "0"}, "NUM_PROCESSES=0: expected a whole number, 1 or more"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: expected a whole number, 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: expected a whole number, 1 to 65535"),
        ({"NNODES": "two"}, "NNODES=two: expected a whole number, 1 or more"),
        ({"NNODES": "2"}, "NNODES=2: needs NODE_RANK and MASTER_ADDR too"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: expected a whole number, 0 to 1"),
        ({"NUM_GPUS": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "NUM_GPUS=3: CUDA_VISIBLE_DEVICES=0,1 names 2"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,gpu1"},
            "CUDA_VISIBLE_DEVICES=0,gpu1: expected numbers or UUIDs (GPU-..., MIG-...), found 'gpu1'",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"},
            "CUDA_VISIBLE_DEVICES=MIG-1,MIG-2: CUDA gives a process one MIG device, and ranks cannot share a GPU; "
            "name one",
        ),
        ({"HOSTFILE": "/no/hosts"}, "HOSTFILE=/no/hosts: no such file"),
    ],
    ids=str,
)
def test_a_wrong_variable_is_one_line(venv: Path, environment: dict[str, str], error: str) -> None:
    done = _run(venv, "my.yaml", **environment)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [f"error: {error}"])


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("# none\n\n", "{}: names no host"),
        ("a slots=2\nb\n", "{}, line 2: expected 'HOST slots=N', found 'b'"),
        ("a slots=0\n", "{}, line 1: expected 'HOST slots=N', found 'a slots=0'"),
        ("a slots=1\na slots=1\n", "{}, line 2: a stands there twice"),
    ],
)
def test_a_wrong_hostfile_is_one_line(venv: Path, tmp_path: Path, lines: str, error: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(lines, encoding="utf-8")
    done = _run(venv, "my.yaml", HOSTFILE=str(hosts))
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [f"error: {error.format(hosts)}"])


# ssh to nowhere: the other end of the connection is on this machine.
SSH = """[ "$1" = -G ] && { echo "hostname address-of-$2"; exit; }
while [ $# -gt 2 ]; do shift; done
exec env -i HOME="$HOME" PATH="$PATH" HOST="$1" bash -c "$2"
"""


def test_a_hostfile_starts_the_stage_on_each_machine(venv: Path, tmp_path: Path) -> None:
    write_script(venv / "bin" / "ssh", SSH)
    # Not the shell's own echo, which writes line by line, so that the lines of two machines may mix.
    says = 'env printf "%s\\n" "$HOST torchrun $* OMP=$OMP_NUM_THREADS WANDB=$WANDB_NAME OTHER=$OTHER"'
    ours = f'[ "$1" = "{OUR_TORCHRUN}" ] || exec {sys.executable} "$@"'
    write_script(venv / "bin" / "python", f"{ours}; shift; {says}")
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=2  # the first\n\ntwo slots=3", encoding="utf-8")
    name = 'it\'s "mine" $HOME\nand more'
    environment = {"HOSTFILE": str(hosts), "OMP_NUM_THREADS": "5", "WANDB_NAME": name, "OTHER": "stays"}
    done = _run(venv, "my.yaml", "data.note=a 'b' $c", MASTER_PORT="1234", **environment)
    assert done.returncode == 0, done.stderr
    for number, (host, slots) in enumerate((("one", 2), ("two", 3))):
        assert (
            f"{host} torchrun --nnodes 2 --node_rank {number} --nproc_per_node {slots} --master_addr address-of-one "
            "--master_port 1234 --module llava_compete.cli train my.yaml --stage sft data.note=a 'b' $c "
            f"OMP=5 WANDB={name} OTHER=\n"
        ) in done.stdout


def test_a_machine_that_cannot_be_reached_ends_the_stage_on_all(venv: Path, tmp_path: Path) -> None:
    write_script(venv / "bin" / "ssh", '[ "${!#}" != -G ] && [[ "$*" == *"two exec"* ]] && exit 255\n' + SSH)
    write_script(venv / "bin" / "python", f'[ "$1" = "{OUR_TORCHRUN}" ] || exec {sys.executable} "$@"; sleep 60')
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n", encoding="utf-8")
    done = _run(venv, "my.yaml", HOSTFILE=str(hosts))
    assert done.returncode == 255
    assert "two: the connection has ended (ssh: 255)" in done.stderr


RANKS = """import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for rank, seconds in enumerate(sys.argv[2:]):
    if os.fork() == 0:
        os.environ["RANK"] = str(rank)
        os.execv(sys.executable, [sys.executable, "-c", f"import time; time.sleep({seconds})", "llava_compete.cli"])
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [((60, 0.5), 1, 30), ((3, 3), 3, 50)], ids=["one hangs", "both save"]
)
def test_a_rank_that_hangs_without_launcher_and_company_is_ended(
    tmp_path: Path, seconds: tuple[float, float], least: float, most: float
) -> None:
    """With company it may be saving, and has minutes."""
    (tmp_path / "ranks.py").write_text(RANKS, encoding="utf-8")
    script = f"""source {ROOT}/scripts/lib/common.sh; source {ROOT}/scripts/lib/ranks.sh
    processes=2 LEFT_SECONDS=1; run_ranks {sys.executable} "$@" """
    command = ["bash", "-c", script, "bash", str(tmp_path / "ranks.py"), "ranks", *map(str, seconds)]
    began = time.monotonic()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 137
    assert least < time.monotonic() - began < most


def test_the_demo_is_the_default_config(venv: Path) -> None:
    command, *_ = _launch(venv, "seed=1")
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
