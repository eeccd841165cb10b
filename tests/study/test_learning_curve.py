"""The curve's bookkeeping: which commands run, what is kept, intervals; a stand-in plays the runs themselves."""

import dataclasses
import json

import numpy as np
import pytest

from llava_compete.errors import UserError
from llava_compete.study import learning_curve


@pytest.fixture
def settings(tmp_path):
    data = tmp_path / "instruct.json"
    data.write_text(json.dumps([{"id": str(number)} for number in range(160)]))
    names = {"parent": "parent", "config": "sft.yaml", "upcycle": "upcycle.yaml", "out": "out"}
    paths = {key: tmp_path / name for key, name in names.items()}
    paths["config"].write_text("training: {per_device_train_batch_size: 8}\n")
    return learning_curve.Settings(**paths, data=data, suite="demo_hard", seeds=3, jobs=2)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for the commands: competition is right 20% more often, from 80 rows on."""
    calls = []

    def command(folder, *arguments):
        words = [str(word) for word in arguments]
        calls.append(words)
        if words[0] != "eval":
            return
        better = 0.2 if "competition" in words[1] and any(f"rows{n}/" in words[1] for n in (80, 160)) else 0.0
        # Seeded by the run's place in the study, not by where pytest keeps its files.
        rng = np.random.default_rng(list(str(folder.relative_to(tmp_path / "out")).encode()))
        for task in ("hard_1", "hard_2"):
            path = folder / "eval" / "samples" / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            scores = rng.random(400) < 0.5 + better
            path.write_text("".join(json.dumps({"id": str(n), "score": float(s)}) + "\n" for n, s in enumerate(scores)))
        (folder / "eval" / "summary.json").write_text(json.dumps({"tasks": {"hard_1": {}, "hard_2": {}}}))

    monkeypatch.setattr(learning_curve, "_command", command)
    return calls


def test_the_curve_covers_every_size_router_and_seed_once(settings, calls, tmp_path):
    result = learning_curve.run(settings)
    assert [point["rows"] for point in result["points"]] == [10, 20, 40, 80, 160]
    assert sum(words[0] == "train" for words in calls) == 5 * 2 * 3
    assert any("max_rows: 10}" in word for words in calls for word in words)
    first, last = result["points"][0]["competition"], result["points"][-1]["competition"]
    assert first["difference_interval"][0] < 0 < first["difference_interval"][1]
    assert last["difference_interval"][0] > 0
    assert last["difference"] == pytest.approx(0.2, abs=0.06)
    text = learning_curve.describe(result, settings.routers, "command")
    assert "exclude 0 at 80, 160 rows" in text
    learning_curve.draw(result, settings.routers, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    before = len(calls)
    learning_curve.run(settings)
    assert len(calls) == before  # finished runs are kept
    with pytest.raises(UserError, match="holds runs with steps 20, now 30"):
        learning_curve.run(dataclasses.replace(settings, steps=30))


def test_steps_see_all_rows_once_or_are_refused(settings, calls):
    learning_curve.run(settings)
    assert all("training.max_steps=20" in words for words in calls if words[0] == "train")
    with pytest.raises(UserError, match="found 19, which see 152 of 160 rows in batches of 8; expected at least 20"):
        learning_curve.run(dataclasses.replace(settings, steps=19))


def test_missing_data_and_failing_commands_are_named(settings, tmp_path):
    settings.data.unlink()
    with pytest.raises(UserError, match="scenes-hard"):
        learning_curve.run(settings)
    with pytest.raises(UserError, match=r"ended with status 2: see .*log\.txt"):
        learning_curve._command(tmp_path, "train", tmp_path / "missing.yaml")


def test_the_largest_set_may_be_smaller_than_the_data(settings, calls):
    result = learning_curve.run(dataclasses.replace(settings, rows=64))
    assert [point["rows"] for point in result["points"]] == [4, 8, 16, 32, 64]
    assert all("training.max_steps=8" in words for words in calls if words[0] == "train")
    with pytest.raises(UserError, match="--rows: found 161; expected 1 to 160, the rows of"):
        learning_curve.run(dataclasses.replace(settings, rows=161))
