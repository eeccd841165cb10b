"""Two processes under DeepSpeed ZeRO have the gradients of one process over all the data (cases: zero_worker.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
# One launch for all cases; importing DeepSpeed twice is most of it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of the two ranks found in every case."""
    out = tmp_path_factory.mktemp("zero") / "result"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    worker = Path(__file__).with_name("zero_worker.py")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [launcher, "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    done = subprocess.run(
        [*command, worker, "0,1,2,3", out], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "mode",
    [
        "router",
        "contest",
        "taught",
        "judged",
        "judged behind a frozen front",
        "judged, routers only",
        "judged by means",
        "tc_moe",
        "moe_plus_plus",
        "autonomy",
        "coupled",
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_equal_one_process(
    cases: list[list[dict[str, Any]]], stage: int, mode: str, micro_batches: int
) -> None:
    key = {"stage": stage, "mode": mode, "micro_batches": micro_batches}
    for rank_cases in cases:
        (case,) = [case for case in rank_cases if key.items() <= case.items()]
        assert case["error"] <= 1e-5, case


def test_ranks_used_disjoint_experts(cases: list[list[dict[str, Any]]]) -> None:
    for first, second in zip(*cases, strict=True):
        assert first["load"][2:4] == [0, 0], first
        assert second["load"][:2] == [0, 0], second
        assert sum(first["load"]) == sum(second["load"]) > 0
