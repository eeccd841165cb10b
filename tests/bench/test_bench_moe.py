"""`llava-compete bench moe` on a tiny shape: rows, ratios, figure."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from llava_compete.bench import moe
from llava_compete.cli import main

SIZES = ["--tokens", "64", "--rounds", "1", "--shape", "16", "32", "4", "2"]


def test_rows_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, rows = tmp_path / "new" / "figure.png", tmp_path / "rows.json"
    threads = torch.get_num_threads()
    assert main(["bench", "moe", *SIZES, "--figure", str(figure), "--json", str(rows)]) == 0
    assert torch.get_num_threads() == threads
    found = {row["case"]: row for row in json.loads(rows.read_text())}
    assert tuple(found) == moe.CASES
    assert found["softmax"]["shape"] == {"D": 16, "I": 32, "E": 4, "K": 2, "tokens": 64}
    assert found["dense_k"]["ratio"] == found["dense_e"]["ratio"] == 1
    competition = found["competition_step"]
    assert competition["ratio"] == pytest.approx(competition["ms"] / found["dense_e"]["ms"])
    assert {case for case, row in found.items() if "asked" in row} == set(moe.JUDGED)
    assert (found["judged_step_all"]["asked"], found["judged_step_means"]["asked"]) == (1, 0)
    assert found["judged_step_next"]["asked"] <= 0.5
    assert figure.stat().st_size > 0


def _peaks(shape: moe.Shape, tokens: int, *cases: str) -> dict[str, float]:
    """MB by case."""
    cpu = torch.device("cpu")
    rows = moe.measure([shape], tokens=tokens, rounds=1, device=cpu, dtype=torch.float32, cases=cases)
    return {row.case: row.peak_mb for row in rows}


def test_recomputation_bounds_a_competition_steps_memory() -> None:
    """At E = 4 within 1.5 of a router step's peak: counted bytes, so exact and quick."""
    peaks = _peaks(moe.Shape(64, 256, 4, 2), 1024, "dense_k", "dense_e", "competition", moe.COMPETITION, moe.RECOMPUTED)
    assert peaks[moe.RECOMPUTED] <= 1.5 * peaks["competition"]
    assert peaks[moe.RECOMPUTED] < peaks[moe.COMPETITION]


def test_of_many_experts_kept_pre_activations_leave_less_than_half_of_a_competition_steps_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """55% less at E = 64, where a chunk is a small part of the tokens."""
    monkeypatch.setitem(moe.CHUNK_TOKENS, "cpu", 32)
    peaks = _peaks(moe.Shape(64, 16, 64, 4), 256, "dense_e", moe.COMPETITION, moe.PRE_ACTIVATIONS)
    assert peaks[moe.PRE_ACTIVATIONS] <= 0.45 * peaks[moe.COMPETITION]


@pytest.mark.parametrize(
    "words",
    [
        "moe --rounds 0",
        "moe --threads 0",
        "moe --shape 8 8 2 4",
        "moe --shape 8 8 5 2",
        "moe --shape 8 0 4 2",
        "data --rows 31",
        "generate --new-tokens 0",
        "generate --device 'cuda:99'",
        "judge --tokens 0",
        "pictures --pages 0",
        "train --repeats 0",
    ],
)
def test_bad_arguments_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *shlex.split(words)]) == 2
    _, option, found, *_ = words.split()
    assert f"{option}: found {found}" in capsys.readouterr().err
