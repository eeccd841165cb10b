"""The realistic run's report, from files as the stages write them: intervals, paired differences, answers, errors."""

import io
import json

import pytest
from PIL import Image

from llava_compete.demo.build import write_test_table
from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit, write_units
from llava_compete.files import write_json
from llava_compete.report.realistic import MODELS, TEXT_MODELS, TRAINING_STAGES, write_report


@pytest.fixture
def finished(tmp_path):
    """20 questions of each of two types; sft knows `kind` and guesses `same`, the others know nothing."""
    for model, folder in MODELS.items():
        units = []
        for number in range(20):
            right = model == "after sft" and number != 7
            units.append(
                Unit(f"kind-{number}", float(right), 1, "kind", "a<b" if right else "?", ("food", "tool")[number % 2])
            )
            units.append(Unit(f"same-{number}", float(number % 2), 1, "same", "yes", ("no", "yes")[number % 2]))
        write_units(tmp_path / folder, "emoji_vendor", units)
        score = sum(unit.score for unit in units) / 40
        write_json(tmp_path / folder / "summary.json", {"tasks": {"emoji_vendor": {"accuracy": score, "n": 40}}})
    for stage, value in zip(TEXT_MODELS.values(), (20.0, 20.5, 21.5), strict=True):
        write_json(tmp_path / f"perplexity_{stage}" / "summary.json", {"perplexity": {"perplexity": value}})
    (tmp_path / "stages").mkdir()
    for stage in TRAINING_STAGES:
        (tmp_path / "stages" / stage).write_text("fingerprint 30.0\n")
        (tmp_path / "stages" / f"{stage}.started").write_text("fingerprint\n")
        lines = [{"step": 1, "loss": 2.0, "memory_gib": 4.5}, {"event": "end", "tokens": 1, "train_seconds": 1.0}]
        (tmp_path / stage / "run").mkdir(parents=True)
        (tmp_path / stage / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


@pytest.fixture
def table(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    rows = [
        {"images": [buffer.getvalue()] * count, "question": "What?", "answer": "food", "type": kind, "id": f"{kind}-0"}
        for kind, count in (("kind", 1), ("same", 2))
    ]
    write_test_table(rows, tmp_path / "emoji_vendor_test.parquet")
    return tmp_path / "emoji_vendor_test.parquet"


def test_scores_stand_beside_blind_answers_and_other_models(finished, table):
    write_report(finished, [table])
    metrics = json.loads((finished / "metrics.json").read_text())
    kind, same = metrics["rows"]
    assert (kind["type"], kind["n"], kind["chance"], kind["blind"]) == ("kind", 20, 0.5, 0.5)
    assert kind["interval"] == pytest.approx([0.764, 0.991], abs=0.001)  # Wilson's, 19 of 20
    assert (kind["above_blind"], same["above_blind"]) == (True, False)
    mean, low, high = kind["differences"]["dense parent"]
    assert mean == pytest.approx(0.95)
    assert 0.8 < low < mean <= high
    assert same["differences"]["dense parent"] == [0.0, 0.0, 0.0]
    assert kind["answers"] == [["a<b", 19, 19], ["?", 0, 1]]
    assert same["answers"] == [["yes", 10, 20]]
    assert metrics["seconds"] == dict.fromkeys(TRAINING_STAGES, 30.0)
    report = (finished / "report.md").read_text()
    assert "| emoji_vendor | kind | a<b (19 of 19); ? (0 of 1) |" in report
    assert "1 of 2 question types lie above the best blind answer" in report
    assert "Perplexity after sft is 1.075 of the language model's alone, NOT within 5%." in report
    page = (finished / "answers.html").read_text()
    assert page.count("<img") == 3
    assert "a&lt;b" in page


def test_what_is_missing_or_not_comparable_is_named(finished, table):
    write_units(finished / "eval_pft", "emoji_vendor", [Unit("other", 1.0, 1, "kind", "", "food")])
    with pytest.raises(UserError, match="dense parent: answered other questions than after sft"):
        write_report(finished, [table])
    (finished / "perplexity_sft" / "summary.json").unlink()
    (finished / "eval_pft" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"eval_pft/summary\.json: missing; the run has not finished"):
        write_report(finished, [table])
