"""Joining synthetic results with known differences, the tables and files, and inputs that cannot be joined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.evaluation.compare.comparison import compare_methods
from llava_compete.evaluation.compare.evaluation_dirs import read_method, read_published
from llava_compete.report.comparison import to_markdown

ANSWER = "a line\u2028that\u2029does\u0085not end"  # JSON lines end at "\n" alone
ROOT = Path(__file__).resolve().parents[3]


def write_run(
    directory: Path,
    tasks: dict[str, list[float]],
    target: str = "yes",
    per_image: int = 0,
    entry=None,
    weight: float = 1.0,
    **summary,
) -> Path:
    """An evaluation directory as the runner leaves it, with the given unit scores (`per_image` of them a group)."""
    (directory / "samples").mkdir(parents=True)
    for task, scores in tasks.items():
        units = [
            {"id": f"q{i}", "score": score, "weight": weight, "type": None, "answer": ANSWER, "target": target}
            | ({"group": f"image{i // per_image}"} if per_image else {})
            for i, score in enumerate(scores)
        ]
        lines = [json.dumps(unit, ensure_ascii=False) + "\n" for unit in units]
        (directory / "samples" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    means = {task: sum(scores) / len(scores) if scores else None for task, scores in tasks.items()}
    entries = {task: {"n": len(tasks[task]), "accuracy": mean, **(entry or {})} for task, mean in means.items()}
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
            write_run(
                tmp_path / f"{name}{seed}" / "eval",
                {task: list(map(float, s)) for task, s in scores.items()},
                checkpoint={"sha256": f"{name}{seed}", "training_seed": seed},
            )
    return tmp_path


def seeds_of(results: Path, name: str, order=range(3)) -> str:
    return f"{name}=" + ",".join(str(results / f"{name}{seed}" / "eval") for seed in order)


def test_known_differences_are_found(results):
    methods = [read_method(seeds_of(results, name)) for name in ("base", "better", "same")]
    comparison = compare_methods(methods, {}, margin=1.0, resamples=2000)
    assert list(comparison.rows) == ["pope", "ai2d", "mean"]
    for row in comparison.rows.values():
        better, same = row.differences["better"], row.differences["same"]
        expected = ttest_rel(row.runs["better"], row.runs["base"])
        assert better.p == pytest.approx(expected.pvalue)
        assert better.over_seeds == pytest.approx(tuple(expected.confidence_interval()))
        assert better.over_questions.low > 10
        assert better.over_questions.low < better.mean < better.over_questions.high
        assert (same.mean, same.p) == (0, 1)
    assert comparison.primary == "mean"
    p = comparison.rows["mean"].differences["better"].p
    assert comparison.holm == {"better": pytest.approx(2 * p), "same": 1}  # over the methods of one row, no more
    assert comparison.is_apart("better")
    assert not comparison.is_apart("same")
    mean = comparison.rows["mean"]
    assert mean.score("base") == pytest.approx(np.mean([comparison.rows[t].score("base") for t in ("pope", "ai2d")]))
    assert mean.num_units == 600
    assert compare_methods(methods, {}, primary="pope", resamples=200).holm["better"] != comparison.holm["better"]
    with pytest.raises(UserError, match="primary: found 'mme', expected one of pope, ai2d, mean"):
        compare_methods(methods, {}, primary="mme")


def test_equal_within_a_margin_is_not_the_same_as_not_told_apart(tmp_path):
    """Three seeds that differ by 0.1 points now and then: not different, and shown to be within 2 points, not 0.1."""
    rng = np.random.default_rng(1)
    for seed in range(3):
        scores = (rng.random(1000) < 0.5).astype(float)
        other = scores.copy()
        other[seed] = 1 - other[seed]
        for name, values in (("a", scores), ("b", other)):
            write_run(tmp_path / f"{name}{seed}" / "eval", {"pope": list(map(float, values))})
    methods = [read_method(seeds_of(tmp_path, name)) for name in "ab"]
    wide, narrow = (compare_methods(methods, {}, margin=margin, resamples=200) for margin in (2.0, 0.1))
    assert not wide.is_apart("b")
    assert wide.is_equivalent("b")
    assert not narrow.is_equivalent("b")
    assert "Within 2 points of a: b" in to_markdown(wide, "")
    assert "Not told apart from a: b" in to_markdown(narrow, "")
    table = wide.detectable()["b"]
    assert list(table) == [3, 5, 10, 20, 30]
    assert table[3] > table[5] > table[30] > 0
    with pytest.raises(UserError, match=r"margin: found 1\.0 with 1 seed"):
        compare_methods([read_method(f"{n}={tmp_path}/{n}0/eval") for n in "ab"], {}, margin=1.0)


def test_runs_are_paired_by_their_recorded_seed(results, tmp_path):
    """Given in another order the result is the same; seeds that do not match are refused."""
    orders = {"base": range(3), "better": (2, 0, 1)}
    there = compare_methods([read_method(seeds_of(results, name)) for name in orders], {}, resamples=200)
    back = compare_methods([read_method(seeds_of(results, *item)) for item in orders.items()], {}, resamples=200)
    assert there.rows == back.rows
    assert "Runs are paired by training seed: 0, 1, 2." in there.notes

    scores = {task: [1.0] * 300 for task in ("pope", "ai2d")}
    for seed in (1, 2, 3):
        write_run(tmp_path / f"late{seed}" / "eval", scores, checkpoint={"sha256": f"{seed}", "training_seed": seed})
        write_run(tmp_path / f"mute{seed}" / "eval", scores, checkpoint={"sha256": f"m{seed}"})
    base = read_method(seeds_of(results, "base"))
    with pytest.raises(UserError, match="training seeds are 1, 2, 3 in 'late' and 0, 1, 2 in 'base'"):
        compare_methods([base, read_method(seeds_of(tmp_path, "late", (1, 2, 3)))], {})
    mute = compare_methods([base, read_method(seeds_of(tmp_path, "mute", (1, 2, 3)))], {}, resamples=200)
    assert mute.notes[0].endswith("by their order on the command line: mute recorded no training seed.")


def test_command_writes_markdown_json_and_figure(results, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [seeds_of(results, "base"), seeds_of(results, "better"), "--out", str(out), "--resamples", "300"]
    arguments += ["--published", str(ROOT / "eval" / "published_665k.json"), "--margin", "0.5"]
    assert main(["compare", *arguments]) == 0
    assert (out / "comparison.png").stat().st_size > 5000
    content = json.loads((out / "comparison.json").read_text())
    assert content["seeds"] == 3
    pope = content["benchmarks"]["pope"]
    assert pope["differences"]["better"]["mean"] > 10
    runs = pope["scores_by_run"]
    assert len(runs["base"]) == len(runs["better"]) == 3
    assert pope["scores"]["base"] == pytest.approx(np.mean(runs["base"]))
    assert pope["differences"]["better"]["deviation"] == pytest.approx(
        np.std(np.subtract(runs["better"], runs["base"]), ddof=1)
    )
    assert set(content["detectable_difference_by_seeds"]["better"]) == {"3", "5", "10", "20", "30"}
    assert content["published"]["softmax"]["pope"] == 87.13
    text = (out / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert "published: softmax" in text
    assert "another model, one run each" in text
    assert "different from base: better" in text
    assert "p over questions" not in text  # with seeds it would only mislead


def test_a_single_seed_claims_nothing_about_training(results):
    methods = [read_method(str(results / f"{name}0" / "eval")) for name in ("base", "better")]
    comparison = compare_methods(methods, {}, resamples=200)
    assert comparison.methods == ["base0", "better0"]  # the run's directory, not "eval"
    difference = comparison.rows["mean"].differences["better0"]
    assert difference.over_seeds is None
    assert difference.deviation is None
    assert comparison.detectable() == {}
    assert comparison.is_apart("better0")
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
        assert row.score(f"{name}-some") == pytest.approx(100 * np.mean(repeated))
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
            compare_methods(methods, {}, resamples=200)
    with pytest.raises(UserError, match="resamples: found 10, too few for 1 differences"):
        compare_methods([single, read_method(f"same={results / 'same0' / 'eval'}")], {}, resamples=10)
    weighted = read_method(str(write_run(tmp_path / "weighted", {"pope": [1.0] * 300}, weight=2.0)))
    with pytest.raises(UserError, match=r"question q0: weight 2\.0 in 'weighted' but 1\.0 in 'base0'"):
        compare_methods([single, weighted], {})
    for key, found in (
        ("generation", {"max_new_tokens": 8}),
        ("data", "other"),
        ("task_version", "2"),
        ("asked", "another digest"),
    ):
        first = read_method(str(write_run(tmp_path / f"{key}1", {"pope": [1.0]}, entry={key: "1"})))
        second = read_method(str(write_run(tmp_path / f"{key}2", {"pope": [1.0]}, entry={key: found})))
        with pytest.raises(UserError, match=rf"task 'pope': {key} is .* in .*; evaluate both alike"):
            compare_methods([first, second], {}, resamples=200)


def test_one_evaluation_under_two_names_is_refused(tmp_path):
    facts = {"checkpoint": {"sha256": "0"}, "settings": {"dtype": "float32", "competition_at_inference": False}}
    first = write_run(tmp_path / "first", {"pope": [1.0, 0.0]}, **facts)
    copy = write_run(tmp_path / "copy", {"pope": [1.0, 0.0]}, **facts)
    for other in (f"b={first}", f"b={copy}"):
        with pytest.raises(UserError, match=r"\(b\) and .*first \(a\) are the same evaluation"):
            compare_methods([read_method(f"a={first}"), read_method(other)], {})
    facts["settings"] = {"dtype": "float32", "competition_at_inference": True}  # another way to run it is no copy
    competing = write_run(tmp_path / "competing", {"pope": [1.0, 0.0]}, **facts)
    compare_methods([read_method(f"a={first}"), read_method(f"b={competing}")], {}, resamples=200)


def test_runs_that_cannot_be_read(tmp_path):
    good = write_run(tmp_path / "good", {"pope": [1.0, 0.0]}, checkpoint={"sha256": "0"})
    copy = write_run(tmp_path / "copy", {"pope": [1.0, 0.0]}, checkpoint={"sha256": "0"})
    no_samples, cut, half_line, no_json, altered = (write_run(tmp_path / n, {"pope": [1.0, 0.0]}) for n in "abcde")
    not_a_number = write_run(tmp_path / "nan", {"pope": [1.0, float("nan")]})
    (altered / "samples" / "pope.jsonl").write_text((cut / "samples" / "pope.jsonl").read_text().replace("0.0", "0.5"))
    a_text = write_run(tmp_path / "text", {"pope": [1.0, 0.0]})
    samples = (a_text / "samples" / "pope.jsonl").read_text()
    (a_text / "samples" / "pope.jsonl").write_text(samples.replace("0.0", '"right"'))
    (no_samples / "samples" / "pope.jsonl").unlink()
    lines = (cut / "samples" / "pope.jsonl").read_text().split("\n")
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
        (str(a_text), "not per-sample scores .*must be real number"),
        (str(altered), r"these samples score 0\.75\d*, but summary\.json says 0\.5"),
        (str(not_a_number), "q1: score nan, weight 1.0; expected numbers"),
        (str(no_json), "not the summary of an evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            read_method(argument)
    (tmp_path / "list.json").write_text('{"routers": [1]}')
    for name in ("missing.json", "list.json"):
        with pytest.raises(UserError, match="expected a JSON file with 'routers'"):
            read_published([tmp_path / name])


def test_published_tables_are_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"routers": {"softmax": {"pope": 1}, "other": {"pope": 2}}}')
    columns = read_published([ROOT / "eval" / "published_665k.json", tmp_path / "mine.json"])
    assert columns["softmax"]["pope"] == 87.13
    assert columns["softmax (mine)"] == {"pope": 1.0}
    assert columns["other"] == {"pope": 2.0}
    libmoe = [scores for name, scores in columns.items() if name not in ("softmax (mine)", "other")]
    assert {len(scores) for scores in libmoe} == {16}
