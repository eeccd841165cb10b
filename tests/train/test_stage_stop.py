"""However a stage is told to stop, or loses its launcher, it saves, ends as it says, and leaves no process behind.

Each test starts real ranks on CPU, so the file is slow (minutes): `bash scripts/test.sh -m slow tests/train`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch_kit import (
    below,
    hear_signals,
    launch_config,
    rank_of,
    ranks_of,
    running,
    started,
    wait_for_step,
    wait_until,
    words_of,
)
from stage_kit import ROOT, stage_environment

from llava_compete.config import dump_yaml
from llava_compete.train import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# One machine through torchrun; through `deepspeed` otherwise.
TORCHRUN = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def _torchrun() -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return {**TORCHRUN, "MASTER_PORT": str(probe.getsockname()[1])}


def _long_stage(data: Path, tmp_path: Path, workers: int = 0) -> dict[str, Any]:
    training = {"max_steps": 2000, "dataloader_num_workers": workers}
    return launch_config(data, tmp_path / "out", 1, 1, training=training)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("told", ["script", "group", "everything"])
def test_a_stage_that_is_told_to_stop_saves(data: Path, tmp_path: Path, told: str, launcher: str) -> None:
    """As `kill` sends it, a terminal (to the process group), and systemd or scancel (to all processes)."""
    config = _long_stage(data, tmp_path, workers=2)
    with started(config, tmp_path / "c.yaml", **(_torchrun() if launcher == "torchrun" else {})) as process:
        wait_for_step(process, tmp_path / "out", 2)
        everything = below(process.pid)
        if told == "group":
            os.killpg(process.pid, signal.SIGINT)
        else:
            for one in [process, *(everything if told == "everything" else [])]:
                one.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
        assert not running(everything)
    assert checkpoints.list_complete(tmp_path / "out")
    assert checkpoints.read_finished(tmp_path / "out") is None


def test_a_stage_that_is_told_before_it_trains_leaves_at_once(data: Path, tmp_path: Path) -> None:
    config = _long_stage(data, tmp_path)
    for reached in (lambda process: True, lambda process: len(ranks_of(process)) == 2):
        with started(config, tmp_path / "c.yaml") as process:
            wait_until(process, lambda process=process, reached=reached: below(process.pid) and reached(process))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 143
            assert not running(below(process.pid))


def _named(processes: Sequence[psutil.Process], word: str) -> psutil.Process:
    (found,) = [one for one in processes if any(word in part for part in words_of(one)) and rank_of(one) is None]
    return found


@pytest.mark.parametrize("word", ["bin/deepspeed", "deepspeed.launcher.launch", "torchrun.py"])
def test_ranks_without_their_launcher_save_and_end(data: Path, tmp_path: Path, word: str) -> None:
    config = _long_stage(data, tmp_path)
    with started(config, tmp_path / "c.yaml", **(_torchrun() if word == "torchrun.py" else {})) as process:
        wait_for_step(process, tmp_path / "out", 2)
        everything = below(process.pid)
        _named(everything, word).kill()
        assert process.wait(timeout=120) == 137
        assert not running(everything)
    assert checkpoints.list_complete(tmp_path / "out")
    assert checkpoints.read_finished(tmp_path / "out") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_the_command_alone_saves_too(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Without a script; the reader of its messages leaves at the same time."""
    config = _long_stage(data, tmp_path, workers=1)
    dump_yaml(config, tmp_path / "c.yaml")
    command = ["llava-compete", "train", str(tmp_path / "c.yaml")]
    environment = {**os.environ, **stage_environment(1)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=hear_signals
    ) as process:
        wait_for_step(process, tmp_path / "out", 2)
        process.stderr.close()
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 143
    assert checkpoints.list_complete(tmp_path / "out")
    assert checkpoints.read_finished(tmp_path / "out") is None


def _two_nodes(config: dict[str, Any], path: Path, *overrides_of_second: str) -> list[subprocess.Popen[str]]:
    dump_yaml(config, path)
    shared = {**os.environ, **stage_environment(1), **_torchrun(), "NNODES": "2"}
    return [
        subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "sft.sh"), str(path), *overrides],
            env={**shared, "NODE_RANK": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, overrides in enumerate(((), overrides_of_second))
    ]


def test_one_node_that_is_told_stops_all(data: Path, tmp_path: Path) -> None:
    nodes = _two_nodes(_long_stage(data, tmp_path), tmp_path / "c.yaml")
    wait_for_step(nodes[0], tmp_path / "out", 2)
    nodes[1].send_signal(signal.SIGTERM)
    assert [node.wait(timeout=120) for node in nodes] == [143, 143]
    assert checkpoints.list_complete(tmp_path / "out")


def test_nodes_with_other_commands_are_refused(data: Path, tmp_path: Path) -> None:
    nodes = _two_nodes(
        _long_stage(data, tmp_path),
        tmp_path / "c.yaml",
        "training.save_steps=7",
        "output_dir=" + str(tmp_path / "other"),
    )
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2]
    host = socket.gethostname()
    (error,) = [line for text in said for line in text.splitlines() if line.startswith("error:")]
    assert error == (
        f"error: rank 1 on {host} was started with training.save_steps=7.0, rank 0 with training.save_steps=500.0; "
        "give all the same command"
    )


def test_a_mistake_of_one_node_is_said(data: Path, tmp_path: Path) -> None:
    nodes = _two_nodes(_long_stage(data, tmp_path), tmp_path / "c.yaml", "sed=1")
    text = nodes[1].communicate(timeout=300)[1]
    nodes[0].terminate()
    nodes[0].communicate(timeout=60)
    assert nodes[1].returncode == 2
    assert "error: rank 1: " in text
    assert "unknown key 'sed'" in text
