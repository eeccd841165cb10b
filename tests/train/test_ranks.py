"""How a stage script stops its ranks, and what it does without their launcher; ranks are a few lines."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launch_kit import below, hear_signals, running, words_of
from launcher_kit import environment_of, make_venv
from stage_kit import ROOT

# A rank saves for half a second after it was told, and finishes after a minute; its words are those of a real one.
RANK = """
import os, pathlib, signal, sys, time
out, told = pathlib.Path(os.environ["OUT"]), []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
(out / f"up{os.environ['RANK']}").touch()
for _ in range(1200):
    time.sleep(0.05)
    if told:
        time.sleep(0.5)
        (out / f"saved{os.environ['RANK']}").touch()
        sys.exit(int(os.environ.get("STATUS", 143)))
"""
# Two ranks, as `deepspeed` starts them (through an inner process, whose end by a signal is no error to the outer one)
# and as torchrun does (signals leave it alone).
INNER = """
import os, subprocess, sys
command = [sys.executable, "-u", "-c", os.environ["PROGRAM"], "-m", "llava_compete.cli", "train"]
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(n)}) for n in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
OUTER = """
import os, subprocess, sys
sys.exit(max(0, subprocess.run([sys.executable, "-c", os.environ["INNER"], "inner"]).returncode))
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    python = f"exec {sys.executable} -c"
    deaf = f"import signal; [signal.signal(n, lambda *_: None) for n in (1, 2, 10, 15)]{INNER}"
    return make_venv(
        tmp_path / "venv", f"{python} {shlex.quote(OUTER)} outer", f"{python} {shlex.quote(deaf)} torchrun"
    )


@contextmanager
def _running(venv: Path, out: Path, script: str = "sft", **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = environment_of(venv, **{"NUM_GPUS": "0", "OUT": str(out), "PROGRAM": RANK, "INNER": INNER, **changes})
    command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *([] if script == "sft" else [str(out)])]
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=hear_signals)
    try:
        yield process
    finally:
        for one in below(process.pid):
            one.kill()
        process.kill()
        process.wait()


def _wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def _both(out: Path, what: str) -> bool:
    return (out / f"{what}0").exists() and (out / f"{what}1").exists()


TORCHRUN = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("launcher", [{}, TORCHRUN], ids=["deepspeed", "torchrun"])
@pytest.mark.parametrize("told", ["script", "group", "everything"])
def test_ranks_save_when_the_stage_is_told(venv: Path, tmp_path: Path, told: str, launcher: dict[str, str]) -> None:
    """As `kill` sends it, a terminal (to the process group), and systemd or scancel (to all processes)."""
    with _running(venv, tmp_path, **launcher) as process:
        _wait_until(lambda: _both(tmp_path, "up"))
        everything = below(process.pid)
        if told == "group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            for one in [process, *(everything if told == "everything" else [])]:
                one.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        assert _both(tmp_path, "saved")
        assert not running(everything)


@pytest.mark.parametrize(
    ("launcher", "word"),
    [({}, "outer"), ({}, "inner"), (TORCHRUN, "torchrun")],
    ids=["deepspeed", "deepspeed's second", "torchrun"],
)
def test_ranks_whose_launcher_is_killed_save_and_end(
    venv: Path, tmp_path: Path, launcher: dict[str, str], word: str
) -> None:
    with _running(venv, tmp_path, **launcher) as process:
        _wait_until(lambda: _both(tmp_path, "up"))
        everything = below(process.pid)
        (killed,) = [one for one in everything if word in (words_of(one)[-1:] + words_of(one)[3:4])]
        killed.kill()
        assert process.wait(timeout=30) == 137
        assert _both(tmp_path, "saved")
        assert not running(everything)


def test_ranks_of_another_stage_are_left_alone(venv: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with _running(venv, tmp_path / "one") as one, _running(venv, tmp_path / "other") as other:
        _wait_until(lambda: _both(tmp_path / "one", "up") and _both(tmp_path / "other", "up"))
        one.terminate()
        assert one.wait(timeout=30) == 143
        time.sleep(0.6)
        assert other.poll() is None
        assert not (tmp_path / "other" / "saved0").exists()


def test_a_stage_without_ranks_yet_leaves_at_once(venv: Path, tmp_path: Path) -> None:
    with _running(venv, tmp_path, INNER="import time; time.sleep(60)") as process:
        _wait_until(lambda: any("inner" in words_of(one) for one in below(process.pid)))
        everything = below(process.pid)
        process.terminate()
        assert process.wait(timeout=10) == 143
        assert not running(everything)


def test_a_stage_that_has_just_finished_has_not_been_stopped(venv: Path, tmp_path: Path) -> None:
    with _running(venv, tmp_path, STATUS="0") as process:
        _wait_until(lambda: _both(tmp_path, "up"))
        process.terminate()
        assert process.wait(timeout=30) == 0


def test_train_all_that_is_told_starts_no_further_stage(venv: Path, tmp_path: Path) -> None:
    """Also where the stage that was running has just finished."""
    for stage in ("pretrain_align", "sft"):
        (tmp_path / f"{stage}.yaml").write_text(f"stage: {stage}\n", encoding="utf-8")
    with _running(venv, tmp_path, "train_all", STATUS="0") as process:
        _wait_until(lambda: _both(tmp_path, "up"))
        for number in range(2):
            (tmp_path / f"up{number}").unlink()
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert not _both(tmp_path, "up")


def test_other_processes_of_a_rank_are_not_told(venv: Path, tmp_path: Path) -> None:
    """Such as a service that a library started: it leaves with its rank."""
    helper = 'import subprocess; helper = subprocess.Popen(["sleep", "30"])'
    with _running(venv, tmp_path, PROGRAM=f"{helper}\n{RANK}\n") as process:
        _wait_until(lambda: _both(tmp_path, "up"))
        helpers = [one for one in below(process.pid) if one.name() == "sleep"]
        assert len(helpers) == 2
        process.terminate()
        _wait_until(lambda: _both(tmp_path, "saved"))
        assert all(map(psutil.Process.is_running, helpers))
        for one in helpers:
            one.kill()
        assert process.wait(timeout=30) == 143
