"""Joining synthetic results with known differences, the tables and files, and inputs that cannot be joined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.compare.comparison import compare_methods
from llava_compete.evaluation.compare.evaluation_dirs import read_method, read_published
from llava_compete.report.comparison import to_markdown

ROOT = Path(__file__).resolve().parents[3]


def write_run(
    directory: Path, tasks: dict[str, list[float]], target: str = "yes", per_image: int = 0, entry=None, **summary
) -> Path:
    """An evaluation directory as the runner leaves it, with the given unit scores (`per_image` of them a group)."""
    (directory / "samples").mkdir(parents=True)
    for task, scores in tasks.items():
        units = [
            {"id": f"q{i}", "score": score, "weight": 1.0, "type": None, "answer": "", "target": target}
            | ({"group": f"image{i // per_image}"} if per_image else {})
            for i, score in enumerate(scores)
        ]
        (directory / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
    entries = {task: {"n": len(scores), **(entry or {})} for task, scores in tasks.items()}
    (directory / "summary.json").write_text(json.dumps({"tasks": entries, **summary}))
    return directory


@pytest.fixture
def results(tmp_path):
    """A baseline of 60%, a method that is 20 points better and one that equals it, three seeds each."""
    rng = np.random.default_rng(0)
    for seed in range(3):
        base = {task: (rng.random(300) < 0.6).astype(float) for task in ("pope", "ai2d")}
        better = {task: np.maximum(scores, rng.random(300) < 0.5) for task, scores in base.items()}
        for name, scores in {"base": base, "better": better, "same": base}.items():
            write_run(tmp_path / f"{name}{seed}" / "eval", {task: list(map(float, s)) for task, s in scores.items()})
    return tmp_path


def seeds_of(results: Path, name: str) -> str:
    return f"{name}=" + ",".join(str(results / f"{name}{seed}" / "eval") for seed in range(3))


def test_known_differences_are_found(results):
    methods = [read_method(seeds_of(results, name)) for name in ("base", "better", "same")]
    comparison = compare_methods(methods, {}, resamples=2000)
    assert list(comparison.rows) == ["pope", "ai2d", "mean"]
    for task, row in comparison.rows.items():
        better, same = row.differences["better"], row.differences["same"]
        assert better.over_questions.low > 10
        assert better.over_questions.low < better.mean < better.over_questions.high
        assert better.over_seeds.low < better.over_questions.low
        assert comparison.holm_questions[task, "better"] < 0.01
        assert comparison.holm_seeds[task, "better"] < 0.05
        assert (same.mean, same.p_questions, comparison.holm_questions[task, "same"]) == (0, 1, 1)
        assert comparison.is_apart(task, "better")
        assert not comparison.is_apart(task, "same")
    mean = comparison.rows["mean"]
    assert mean.scores["base"] == pytest.approx(np.mean([comparison.rows[t].scores["base"] for t in ("pope", "ai2d")]))
    assert mean.num_units == 600


def test_command_writes_markdown_json_and_figure(results, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [seeds_of(results, "base"), seeds_of(results, "better"), "--out", str(out), "--resamples", "300"]
    assert main(["compare", *arguments, "--published", str(ROOT / "eval" / "published_665k.json")]) == 0
    assert (out / "comparison.png").stat().st_size > 5000
    content = json.loads((out / "comparison.json").read_text())
    assert content["seeds"] == 3
    assert content["benchmarks"]["pope"]["differences"]["better"]["mean"] > 10
    assert content["published"]["softmax"]["pope"] == 87.13
    text = (out / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert "published: softmax" in text
    assert "another model, one run each" in text
    assert "different from base: better" in text


def test_a_single_seed_claims_nothing_about_training(results):
    methods = [read_method(str(results / f"{name}0" / "eval")) for name in ("base", "better")]
    comparison = compare_methods(methods, {}, resamples=200)
    assert comparison.methods == ["base0", "better0"]  # the run's directory, not "eval"
    difference = comparison.rows["mean"].differences["better0"]
    assert difference.over_seeds is None
    assert difference.p_seeds is None
    assert comparison.holm_seeds == {}
    assert "for these trained models only" in to_markdown(comparison, "llava-compete compare")


def test_questions_about_one_image_are_resampled_together(tmp_path):
    """Ten questions an image whose answers are right or wrong together: only the images are independent."""
    right = np.random.default_rng(0).random(60) < 0.5
    repeated = [float(value) for value in np.repeat(right, 10)]
    widths = {}
    for name, per_image in (("alone", 0), ("grouped", 10)):
        methods = [
            read_method(str(write_run(tmp_path / f"{name}-{method}", {"pope": scores}, per_image=per_image)))
            for method, scores in (("zero", [0.0] * 600), ("some", repeated))
        ]
        row = compare_methods(methods, {}, resamples=2000).rows["pope"]
        assert row.scores[f"{name}-some"] == pytest.approx(100 * np.mean(repeated))
        interval = row.differences[f"{name}-some"].over_questions
        widths[row.num_units] = interval.high - interval.low
    assert set(widths) == {600, 60}
    assert widths[60] / widths[600] == pytest.approx(np.sqrt(10), rel=0.1)


def test_what_the_runs_do_not_share_is_said(tmp_path):
    """Tasks that not all have are left out by name; settings that differ on purpose are named."""
    scores = [1.0, 0.0] * 20
    first = write_run(tmp_path / "a", {"pope": scores, "mme": scores}, settings={"dtype": "float32"})
    second = write_run(tmp_path / "b", {"pope": scores, "ai2d": scores, "gqa": []}, settings={"dtype": "bfloat16"})
    comparison = compare_methods([read_method(str(first)), read_method(str(second))], {}, resamples=200)
    assert list(comparison.rows) == ["pope"]
    assert comparison.notes[0].endswith("per-sample scores of them: mme, ai2d, gqa.")
    assert comparison.notes[1] == "The runs differ in dtype: bfloat16, float32."
    assert comparison.notes[0] in to_markdown(comparison, "")


def test_a_name_or_a_directory_with_an_equals_sign(tmp_path):
    directory = write_run(tmp_path / "lr=1e-3" / "eval", {"pope": [1.0]})
    assert read_method(str(directory)).name == "lr=1e-3"
    assert read_method(f"slow={directory}").name == "slow"


def test_results_that_cannot_be_joined(results, tmp_path):
    base = read_method(seeds_of(results, "base"))
    single = read_method(f"base0={results / 'base0' / 'eval'}")
    short = read_method(str(write_run(tmp_path / "short", {"pope": [1.0] * 10})))
    other = read_method(str(write_run(tmp_path / "other", {"pope": [1.0] * 300}, target="no")))
    unrelated = read_method(str(write_run(tmp_path / "unrelated", {"mme": [1.0]})))
    for methods, message in (
        ([base], "at least two"),
        ([base, base], "same name"),
        ([base, single], "number of training seeds"),
        ([single, short], "'short' answered 10 questions and 'base0' 300, 10 of them the same"),
        ([single, other], "question q0: target 'no' in 'other'"),
        ([single, unrelated], "no task with per-sample scores that all of"),
    ):
        with pytest.raises(UserError, match=message):
            compare_methods(methods, {}, resamples=10)
    with pytest.raises(UserError, match="resamples: found 10, too few for 3 differences"):
        compare_methods([single, read_method(f"same={results / 'same0' / 'eval'}")], {}, resamples=10)
    for key, found in (("generation", {"max_new_tokens": 8}), ("data", "other"), ("task_version", "2")):
        first = read_method(str(write_run(tmp_path / f"{key}1", {"pope": [1.0]}, entry={key: "1"})))
        second = read_method(str(write_run(tmp_path / f"{key}2", {"pope": [1.0]}, entry={key: found})))
        with pytest.raises(UserError, match=rf"task 'pope': {key} is .* in .*; evaluate both alike"):
            compare_methods([first, second], {}, resamples=200)


def test_runs_that_cannot_be_read(tmp_path):
    good = write_run(tmp_path / "good", {"pope": [1.0, 0.0]}, checkpoint={"sha256": "0"})
    copy = write_run(tmp_path / "copy", {"pope": [1.0, 0.0]}, checkpoint={"sha256": "0"})
    no_samples, cut, half_line, no_json = (write_run(tmp_path / name, {"pope": [1.0, 0.0]}) for name in "abcd")
    (no_samples / "samples" / "pope.jsonl").unlink()
    lines = (cut / "samples" / "pope.jsonl").read_text().splitlines()
    (cut / "samples" / "pope.jsonl").write_text(lines[0] + "\n")
    (half_line / "samples" / "pope.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    (no_json / "summary.json").write_text("{")
    for argument, message in (
        (f"x={good},{good}", "evaluations of the same checkpoint"),
        (f"x={good},{copy}", "evaluations of the same checkpoint"),
        (str(tmp_path), "no finished evaluation"),
        (f"x={tmp_path / 'nowhere'}", "no finished evaluation"),
        ("x=", "expected DIR or NAME=DIR"),
        (str(no_samples), "missing, although summary.json names the task"),
        (str(cut), "1 samples, but summary.json says 2"),
        (str(half_line), "not per-sample scores"),
        (str(no_json), "not the summary of an evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            read_method(argument)
    (tmp_path / "list.json").write_text('{"routers": [1]}')
    for name in ("missing.json", "list.json"):
        with pytest.raises(UserError, match="expected a JSON file with 'routers'"):
            read_published(tmp_path / name)
