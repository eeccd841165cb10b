"""Our torchrun with small programs in place of ranks: its status is theirs, and what goes wrong is one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stage_kit import ROOT, stage_environment


def _start(port: int, program: str) -> subprocess.Popen[str]:
    options = ["--nnodes", "1", "--node_rank", "0", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    launcher = [sys.executable, str(ROOT / "scripts" / "lib" / "torchrun.py"), *options, "--master_port", str(port)]
    command = [*launcher, "--no-python", sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("raise SystemExit(143)", 143, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, "error: rank 0 was ended by SIGKILL\n"),
    ],
)
def test_the_status_is_the_ranks(program: str, status: int, said: str) -> None:
    process = _start(_free_port(), program)
    assert process.communicate(timeout=60) == ("", said)
    assert process.returncode == status


def test_a_signal_leaves_the_ranks_alone() -> None:
    """They are told by the stage script, and are not killed 30 seconds later."""
    process = _start(_free_port(), "import time; print('up', flush=True); time.sleep(1); raise SystemExit(7)")
    assert process.stdout.readline() == "up\n"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "rendezvous",
    [["--standalone"], ["--nnodes", "1", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port"]],
    ids=["c10d", "static"],
)
def test_ranks_that_are_started_anew_meet(rendezvous: list[str]) -> None:
    """PyTorch's own torchrun keeps its store, and so the port of the rank 0 that is gone."""
    port = [str(_free_port())] if rendezvous[-1] == "--master_port" else []
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *port]
    worker = Path(__file__).with_name("restart_worker.py")
    result = subprocess.run(
        [*launcher, "--nproc_per_node", "2", "--max-restarts", "1", worker],
        env={**os.environ, **stage_environment(2), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.stdout.count("value 0") == 2, result.stderr
    assert result.returncode == 0


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = _start(port, "pass")
        assert process.communicate(timeout=60) == (
            "",
            f"error: port in use: 127.0.0.1:{port}; set MASTER_PORT to a free port\n",
        )
    assert process.returncode == 2
