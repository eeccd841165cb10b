"""`llava-compete recipes`: what the package ships is listed and copied as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_compete import shipped
from llava_compete.cli import main
from llava_compete.config import load_config, read_yaml
from llava_compete.evaluation.config import EVAL_ROOT
from llava_compete.evaluation.lmms.suites import beside_their_data
from llava_compete.train.config import TrainConfig


def test_recipes_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(path.name in listed for path in shipped.folder("configs").iterdir() if any(path.glob("*.yaml")))
    assert main(["recipes", "demo", "--out", str(tmp_path / "mine")]) == 0
    original = shipped.folder("configs") / "demo"
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == {
        file.name: file.read_bytes() for file in original.iterdir()
    }


def test_each_recipe_with_a_competition_has_one_that_the_loss_judges() -> None:
    recipes = [path.parent for path in shipped.folder("configs").glob("*/upcycle.yaml")]
    assert len(recipes) >= 6
    for recipe in recipes:
        papers, other = (read_yaml(recipe / name) for name in ("sft.yaml", "sft_loss.yaml"))
        parts = [key for key, value in read_yaml(recipe / "upcycle.yaml")["moe"].items() if isinstance(value, dict)]
        assert other.pop("moe") == {part: {"competition_judge": "loss"} for part in parts}
        assert other.pop("output_dir") == papers.pop("output_dir") + "_loss"
        assert other == papers
        load_config(TrainConfig, recipe / "sft_loss.yaml")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    for words, message in (
        (["recipes", "dmo"], "did you mean 'demo'?"),
        (["recipes", "demo", "--out", str(tmp_path)], "not empty; choose another --out"),
        (["recipes", "--out", str(tmp_path)], "needs the name of a recipe"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_wheels_tasks_find_the_data_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = EVAL_ROOT / "tasks"
    assert beside_their_data(own) == own
    monkeypatch.setattr(shipped, "is_copy", lambda: True)
    monkeypatch.chdir(tmp_path)
    tasks = beside_their_data(own)
    assert {path.name for path in tasks.iterdir()} >= {path.name for path in own.glob("*.yaml")}
    assert (tasks / "../../playground").resolve() == tmp_path / "playground"
    assert beside_their_data(tmp_path) == tmp_path
