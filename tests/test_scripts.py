"""What scripts of several stages or runs have in common (scripts/lib): failures, signals, and what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _start(program: str, out: Path) -> subprocess.Popen[str]:
    sources = "\n".join(f"source scripts/lib/{name}.sh" for name in ("common", "stages", "study"))
    text = f"set -euo pipefail\nOUT={out}\n{sources}\nMETHODS=(a b)\n{program}"
    command = ["bash", "-c", text]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_signals)


def _hear_signals() -> None:
    """Tests that run behind `nohup` or a script's `&` would pass their ignored signals on."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_a_stage_ends_at_its_first_command_that_fails(tmp_path: Path) -> None:
    """It was marked as finished where a later one did not fail."""
    process = _start("several() { false; touch $OUT/went_on; }; stage several x several", tmp_path)
    assert "error: stage several failed" in process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert not (tmp_path / "went_on").exists()
    assert not (tmp_path / "stages" / "several").exists()


@pytest.mark.parametrize(
    ("program", "number"),
    [("stage work x run_one a 0", signal.SIGINT), ("study_runs $OUT 1 2", signal.SIGTERM)],
    ids=["stage", "study"],
)
def test_what_a_script_has_started_saves_and_ends_with_it(program: str, number: int, tmp_path: Path) -> None:
    """Each run leaves some time after it was told, as a stage that saves, and is started by a function's shell."""
    work = (
        "run_one() { bash -c 'trap \"sleep 0.1; touch $0.saved; exit 143\" TERM; touch $0.up; sleep 30 & wait' "
        f"{tmp_path}/$1-$2; }}"
    )
    process = _start(f"{work}\n{program}", tmp_path)
    expected = 1 if program.startswith("stage") else 2
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("*.up"))) < expected:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert len(list(tmp_path.glob("*.saved"))) == expected


@pytest.mark.parametrize(
    ("summary", "status"),
    [(None, 1), ('{\n  "failures": {},\n', 0), ('{\n  "failures": {\n    "a": "b"', 1), ("{}", 0)],
)
def test_a_run_is_done_if_no_benchmark_failed(summary: str | None, status: int, tmp_path: Path) -> None:
    if summary is not None:
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "summary.json").write_text(summary)
    process = _start("study_done $OUT", tmp_path)
    process.communicate(timeout=30)
    assert process.returncode == status
