"""The table of pages as a square and in tiles, from files as the stages write them; a picture's cost is measured."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_model

from llava_compete.errors import UserError
from llava_compete.evaluation.unit_scores import Unit, write_units
from llava_compete.files import write_json
from llava_compete.model.build import save_checkpoint
from llava_compete.study.documents import STAGES, collect, picture_cost, write_report

RIGHT = {"square": 4, "tiles_4": 8}  # of 10 questions


@pytest.fixture
def page(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 60), (250, 240, 250)).save(tmp_path / "page.png")
    return tmp_path / "page.png"


@pytest.fixture
def finished(tmp_path: Path) -> dict[str, Path]:
    folders = {}
    for name, right in RIGHT.items():
        run = tmp_path / name / "seed0"
        units = [
            Unit(f"form-{at}", float(at < right), 1, ("cell", "total")[at % 2], "?", "Tea" if at < 6 else "Salt")
            for at in range(10)
        ]
        write_units(run / "eval", "documents_form", units)
        write_json(run / "eval" / "summary.json", {"tasks": {"documents_form": {}}, "seconds": 12.0})
        for stage in STAGES:
            lines = [
                {"step": 1, "loss": 2.0, "memory_gib": 4.5},
                {"event": "end", "train_seconds": 30.0, "samples": 8, "steps": 4},
            ]
            (run / stage / "run").mkdir(parents=True)
            (run / stage / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        model, processor = tiny_model(tiles=None if name == "square" else {"max": 4})
        save_checkpoint(model, processor, run / "sft")
        folders[name] = tmp_path / name
    difference = {"mean": 40.0, "over_questions": [10.0, 70.0], "over_seeds": None}
    write_json(
        tmp_path / "comparison" / "comparison.json",
        {
            "baseline": "square",
            "primary": "documents_form",
            "p_holm": {"tiles_4": 0.01},
            "benchmarks": {"documents_form": {"differences": {"tiles_4": difference}}},
        },
    )
    return folders


def test_scores_costs_and_differences(finished: dict[str, Path], page: Path, tmp_path: Path) -> None:
    text = write_report(finished, page, tmp_path / "comparison", tmp_path / "out")
    assert text == (tmp_path / "out" / "README.md").read_text()
    methods = json.loads((tmp_path / "out" / "metrics.json").read_text())["methods"]
    square, tiles = methods["square"], methods["tiles_4"]
    assert (square["accuracy"], tiles["accuracy"]) == (0.4, 0.8)
    assert square["by_type"]["cell"] == {"n": 5, "accuracy": 0.4, "blind": 0.6}
    assert (square["train_seconds"], square["eval_seconds"], square["rows"]) == (60, 12, 16)
    assert (square["tiles"], tiles["tiles"]) == (1, 5)
    assert tiles["tokens"] > 2 * square["tokens"]
    assert tiles["peak_mib_a_picture"] > square["peak_mib_a_picture"] > 0
    assert "| tiles_4 | +40.0 | +10.0 to +70.0 |  | 0.0100 |" in text


def test_a_run_that_has_not_finished_is_named(finished: dict[str, Path], page: Path, tmp_path: Path) -> None:
    (finished["square"] / "seed0" / "eval" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json: missing"):
        collect(finished["square"])
    with pytest.raises(UserError, match=r"comparison\.json: missing"):
        write_report(finished, page, tmp_path / "nowhere", tmp_path / "out")


def test_tokens_are_those_that_the_model_counts(finished: dict[str, Path], page: Path) -> None:
    cost = picture_cost(finished["tiles_4"] / "seed0" / "sft", page)
    _, processor = tiny_model(tiles={"max": 4})
    counted = processor._get_num_multimodal_tokens(image_sizes=[(60, 40)])
    assert cost["tokens"] == counted["num_image_tokens"][0]
