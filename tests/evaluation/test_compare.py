"""Joining synthetic results with known differences, the tables and files, and inputs that cannot be joined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.compare import compare_methods, read_method, read_published
from llava_compete.evaluation.compare_report import to_markdown

ROOT = Path(__file__).resolve().parents[2]


def write_run(directory: Path, tasks: dict[str, list[float]], target: str = "yes") -> Path:
    """An evaluation directory as the runner leaves it, with the given unit scores."""
    (directory / "samples").mkdir(parents=True)
    for task, scores in tasks.items():
        units = [
            {"id": f"q{i}", "score": score, "weight": 1.0, "type": None, "answer": "", "target": target}
            for i, score in enumerate(scores)
        ]
        (directory / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
    (directory / "summary.json").write_text(json.dumps({"tasks": {task: {} for task in tasks}}))
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
        assert comparison.holm_p[task, "better"] < 0.01
        assert (same.mean, same.p_questions, comparison.holm_p[task, "same"]) == (0, 1, 1)
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
    assert difference.p_runs is None
    assert "for these trained models only" in to_markdown(comparison, "llava-compete compare")


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
        ([single, unrelated], "no task that all of"),
    ):
        with pytest.raises(UserError, match=message):
            compare_methods(methods, {}, resamples=10)
    with pytest.raises(UserError, match="no finished evaluation"):
        read_method(str(tmp_path))
    with pytest.raises(UserError, match="expected a JSON file with 'routers'"):
        read_published(tmp_path / "missing.json")
