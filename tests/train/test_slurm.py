"""When a batch script queues its job again: the real script, with stand-ins for srun and scontrol.

`bash scripts/two_nodes.sh` does the same with Slurm's own daemons, where they are installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from stage_kit import ROOT

# `show hostnames`, `show job`, `requeue`.
SCONTROL = """case "$1 $2" in
  "show hostnames") echo one; echo two ;;
  "show job") echo "   JobState=$STATE Reason=None" ;;
  *) echo "$*" >>"$OUT/asked" ;;
esac"""


def _start(tmp_path: Path, script: str, srun: str, state: str = "RUNNING") -> subprocess.Popen[str]:
    for name, body in (("srun", srun), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    ours = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "STATE": state, "SLURM_JOB_NODELIST": "x"}
    command = ["bash", str(ROOT / "scripts" / "slurm" / script), "sft", "my.yaml", "seed=1"]
    return subprocess.Popen(command, env={**os.environ, **job, **ours}, stdout=subprocess.PIPE, text=True)


def _queued_again(tmp_path: Path) -> bool:
    asked = tmp_path / "asked"
    return asked.is_file() and asked.read_text(encoding="utf-8") == "requeue 7\n"


@pytest.mark.parametrize("script", ["stage.sbatch", "train_all.sbatch"])
@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (143, "RUNNING", True),  # told to stop, and saved
        (138, "RUNNING", True),  # ended by USR1 before there was anything to save
        (143, "COMPLETING", False),  # scancel
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (137, "RUNNING", False),
    ],
)
def test_a_stopped_job_is_queued_again(tmp_path: Path, script: str, status: int, state: str, again: bool) -> None:
    process = _start(tmp_path, script, f"exit {status}", state)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert _queued_again(tmp_path) == again


def test_the_signal_before_the_time_limit_reaches_the_step(tmp_path: Path) -> None:
    process = _start(tmp_path, "stage.sbatch", "trap 'exit 143' USR1; echo up; while :; do sleep 0.05; done")
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 143
    assert _queued_again(tmp_path)


def test_a_cancelled_job_waits_for_its_step(tmp_path: Path) -> None:
    """Slurm signals the batch script and the step; the script alone is no reason to leave before they have saved."""
    process = _start(tmp_path, "stage.sbatch", "echo up; sleep 1; echo saved; exit 143", "COMPLETING")
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.read() == "saved\n"
    assert process.wait(timeout=30) == 143
    assert not _queued_again(tmp_path)


@pytest.mark.parametrize(("value", "said"), [("", ""), ("node", "moe.expert_parallel=4"), ("job", None)])
def test_experts_over_the_gpus_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str | None
) -> None:
    monkeypatch.setenv("EXPERT_PARALLEL", value)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    process = _start(tmp_path, "stage.sbatch", 'echo "${@: -1}"')
    found = process.communicate(timeout=30)[0].strip()
    assert (process.returncode, found) == ((2, "") if said is None else (0, said or "seed=1"))


def test_each_machine_gets_its_number_and_all_the_cores(tmp_path: Path) -> None:
    process = _start(
        tmp_path, "stage.sbatch", 'printf "%s\\n" "$@" $NNODES $MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK'
    )
    words = process.communicate(timeout=30)[0].splitlines()
    step = ["bash", "-c", 'NODE_RANK=$SLURM_NODEID exec bash "scripts/$0.sh" "$@"', "sft", "my.yaml", "seed=1"]
    assert words == ["--kill-on-bad-exit=1", *step, "2", "one", "20007", "64"]
