"""The judgement's rounding in bfloat16, beside the task's gradient."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava_compete.bench import judge
from llava_compete.bench.moe import Shape
from llava_compete.cli import main


def test_rounding_is_small_beside_the_task_and_nothing_is_left_where_experts_agree() -> None:
    rows = {row.start: row for row in judge.measure(Shape(32, 64, 4, 2), 200, torch.device("cpu"))}
    assert rows.keys() == judge.STARTS.keys()
    assert rows["upcycled"].judge < 1e-5
    apart = rows["apart by 100%"]
    assert apart.judge > 0.1 * apart.task > 0
    assert apart.judge_noise < 0.05 * apart.task
    assert apart.task_noise < 0.05 * apart.task
    assert 0 < apart.asked < 1
    assert len(list(judge.table(Shape(32, 64, 4, 2), list(rows.values())))) == 1 + len(rows)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "judge", "--shape", "16", "32", "4", "2", "--tokens", "20", "--json", str(tmp_path / "n.json")]
    assert not main(words)
    rows = json.loads((tmp_path / "n.json").read_text())
    printed = capsys.readouterr().out
    assert [row["start"] for row in rows] == list(judge.STARTS)
    assert all(f"{row['judge']:.2e}" in printed for row in rows)
    assert main(["bench", "judge", "--shape", "16", "32", "4", "4"]) == 2
    assert "--shape: found 16 32 4 4, expected sizes >= 1 and K < E" in capsys.readouterr().err
