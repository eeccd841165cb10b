"""The curve's differences are paired t over seeds, finished cells are kept, and the command writes its files."""

import dataclasses
import json

import pytest

from llava_compete import cli
from llava_compete.evaluation.compare.statistics import paired_t
from llava_compete.study import learning_curve
from llava_compete.study.routing import tasks


def test_the_command_writes_a_paired_curve_and_keeps_its_runs(tmp_path, monkeypatch, capsys):
    name = "teacher_clusters_1000"
    monkeypatch.setitem(tasks.TASKS, name, dataclasses.replace(tasks.TASKS[name], steps=4))
    command = ["study", "learning-curve", "--gate", "clusters", "--sizes", "50", "200", "--seeds", "3"]
    command += ["--rules", "judge_all", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    point = json.loads((tmp_path / "learning_curve.json").read_text())["points"][1]
    assert point["n"] == 200
    pairs = zip(point["judge_all"]["by_seed"], point["softmax"]["by_seed"], strict=True)
    expected = paired_t([ours - theirs for ours, theirs in pairs])
    assert point["judge_all"]["difference"] == expected.mean
    assert point["judge_all"]["interval"] == list(expected.interval)
    assert (tmp_path / "learning_curve.png").stat().st_size > 5000
    # The 10 experts that were not chosen answer, one forward each; 2 are paid for, forward and twice that backward.
    assert point["judge_all"]["price"] == pytest.approx(10 / (3 * 2))
    assert point["softmax"]["price"] == 0
    assert "| 200 | 0" in (tmp_path / "README.md").read_text().replace("| 1.", "| 0.")
    monkeypatch.setattr(learning_curve, "train", None)  # nothing is trained again
    assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("words", "message"), [(["--rules", "best"], "--rules: found 'best'"), (["--seeds", "1"], "--seeds: found 1")]
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    assert cli.main(["study", "learning-curve", "--out", str(tmp_path), *words]) != 0
    assert message in capsys.readouterr().err
