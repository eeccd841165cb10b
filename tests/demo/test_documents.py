"""Pages of small print: answers stand on the page, text has the size that is promised, the same every time."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_compete.cli import main
from llava_compete.config import load_config, read_yaml
from llava_compete.data.records import parse_row
from llava_compete.demo.documents import build
from llava_compete.demo.documents.layouts import LAYOUTS
from llava_compete.demo.documents.paper import TEXT_SIZES, font
from llava_compete.evaluation.config import EVAL_ROOT, EvalConfig
from llava_compete.train.config import TrainConfig

RECIPE = Path(__file__).parents[2] / "configs" / "documents"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("documents") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "NUM_TEST", 4)
        assert build.build_documents(out, train_pages=4).built
        first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
        assert not build.build_documents(out, train_pages=4).built
        assert build.build_documents(out, train_pages=4, force=True).built
    assert first == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    return out


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_answer_stands_on_the_page(kind: str) -> None:
    for seed in range(12):
        page = LAYOUTS[kind](random.Random(seed))
        written = " ".join(page.lines)
        assert all(600 <= side <= 1200 for side in page.image.size)
        assert {question.kind for question in page.questions} >= set(build.TESTED[kind])
        for question in page.questions:
            assert question.answer in written, question


def test_a_receipts_sums_are_right() -> None:
    for seed in range(12):
        lines = LAYOUTS["receipt"](random.Random(seed)).lines
        at = lines.index("Subtotal")
        prices = [float(price) for price in lines[6:at:2]]
        subtotal, tax, total = (float(lines[at + place]) for place in (1, 3, 5))
        assert lines[at + 4] == "Total"
        assert sum(prices) == pytest.approx(subtotal)
        assert subtotal + tax == pytest.approx(total)


def test_the_largest_bar_is_the_one_whose_name_is_asked_for() -> None:
    """Read off the pixels: the top of the bar above each name."""
    for seed in range(6):
        page = LAYOUTS["chart"](random.Random(seed))
        pixels = np.asarray(page.image).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
        colours, counts = np.unique(pixels, return_counts=True)
        is_bar = pixels == colours[np.argsort(counts)[-2]]  # after the paper's
        columns = is_bar.any(0).astype(int)
        starts = np.flatnonzero(np.diff(columns, prepend=0) == 1)
        heights = [is_bar[:, start + 2].sum() for start in starts]
        names = page.lines[-len(starts) :]
        answers = {question.kind: question.answer for question in page.questions}
        assert answers == {"largest": names[int(np.argmax(heights))], "smallest": names[int(np.argmin(heights))]}


def test_text_is_8_to_12_pixels_of_a_real_font() -> None:
    assert TEXT_SIZES == (8, 12)
    for size in range(8, 13):
        face = font("sans", False, size)
        assert face.getname() == ("DejaVu Sans", "Book")
        _, top, _, bottom = face.getbbox("Total 23.45")
        assert 0.6 * size <= bottom - top <= size


def test_rows_and_tests(built: Path) -> None:
    meta = json.loads((built / "eval/meta.json").read_text())
    for name in ("read", "instruct"):
        rows = json.loads((built / f"{name}.json").read_text())
        assert len(rows) == meta["rows"][name] == 4
        assert all((built / "images" / image).is_file() for row in rows for image in parse_row(row, "?").images)
    trained = {path.read_bytes() for path in (built / "images").iterdir()}
    for kind, types in build.TESTED.items():
        table = pq.read_table(built / f"eval/documents_{kind}_test.parquet").to_pylist()
        assert meta["tasks"][f"documents_{kind}"]["n"] == len(table) == 4
        assert {row["type"] for row in table} == set(types)
        for row in table:
            assert row["image"]["bytes"] not in trained
            assert Image.open(io.BytesIO(row["image"]["bytes"])).mode == "RGB"


def test_the_command_and_a_foreign_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["data", "documents", "--train-pages", "2", "--out", str(tmp_path)]) == 2
    assert "was not made by this command" in capsys.readouterr().err


def test_scores() -> None:
    spec = importlib.util.spec_from_file_location("documents", EVAL_ROOT / "tasks" / "documents.py")
    assert spec is not None
    assert spec.loader is not None
    functions: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    document = {"answer": "12.50", "type": "total", "id": "a"}
    answers = {"12.50": 1, " 12.50.": 1, "1250": 0, "12.5": 0, "it is 12.50": 0, "": 0}
    assert {text: functions.score(document, [text])["accuracy"]["score"] for text in answers} == answers
    assert functions.score({**document, "answer": "3 May 2001"}, ["3  may 2001"])["accuracy"]["score"] == 1


def test_the_recipe_and_its_tasks_fit_the_data() -> None:
    for path in RECIPE.glob("*.yaml"):
        load_config(EvalConfig if path.stem == "eval" else TrainConfig, path)
    assert read_yaml(EVAL_ROOT / "suites" / "documents.yaml")["tasks"] == [f"documents_{kind}" for kind in LAYOUTS]
    for kind in LAYOUTS:
        text = (EVAL_ROOT / "tasks" / f"documents_{kind}.yaml").read_text()
        assert f"playground/data/documents/eval/documents_{kind}_test.parquet" in text
