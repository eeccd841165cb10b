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
from llava_compete.demo.documents import build, forms
from llava_compete.demo.documents.layouts import LAYOUTS, MONTHS
from llava_compete.demo.documents.paper import TEXT_SIZES, font
from llava_compete.evaluation.config import EVAL_ROOT, EvalConfig
from llava_compete.train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
COLLECTIONS = {"documents": build.PAGES, "forms": build.FORMS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("documents") / "data"
    few = build.PAGES._replace(num_test=4)
    assert build.build_documents(out, 4, collection=few).built
    first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    assert not build.build_documents(out, 4, collection=few).built
    assert build.build_documents(out, 4, force=True, collection=few).built
    assert first == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    return out


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_answer_stands_on_the_page(kind: str) -> None:
    for seed in range(12):
        page = LAYOUTS[kind](random.Random(seed))
        written = " ".join(page.lines)
        assert all(600 <= side <= 1200 for side in page.image.size)
        assert {question.kind for question in page.questions} >= set(build.PAGES.tested[kind])
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
    for kind, types in build.PAGES.tested.items():
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
    answers = {
        "12.50": 1,
        " 12.50.": 1,
        "Total 12.50: 12.50": 1,
        "12.50: 12.60": 0,
        "1250": 0,
        "12.5": 0,
        "it is 12.50": 0,
        "": 0,
    }
    assert {text: functions.score(document, [text])["accuracy"]["score"] for text in answers} == answers
    assert functions.score({**document, "answer": "3 May 2001"}, ["3  may 2001"])["accuracy"]["score"] == 1


@pytest.mark.parametrize("name", COLLECTIONS)
def test_the_recipe_and_its_tasks_fit_the_data(name: str) -> None:
    for path in (CONFIGS / name).glob("*.yaml"):
        load_config(EvalConfig if path.stem == "eval" else TrainConfig, path)
    kinds = COLLECTIONS[name].layouts
    assert read_yaml(EVAL_ROOT / "suites" / f"{name}.yaml")["tasks"] == [f"documents_{kind}" for kind in kinds]
    for kind in kinds:
        text = (EVAL_ROOT / "tasks" / f"documents_{kind}.yaml").read_text()
        assert f"playground/data/{name}/eval/documents_{kind}_test.parquet" in text


def test_a_forms_answers_stand_in_its_text_where_they_are_asked_for() -> None:
    """Read off the text alone: total and month first, then a table of rows and the names of bars, in either order."""
    largest, orders = [], set()
    for seed in range(12):
        page = forms.form(random.Random(seed))
        assert page.image.size == (forms.SIDE, forms.SIDE)
        first, *blocks = (line.split() for line in page.lines)
        orders.add(len(blocks[0]))
        names = next(words for words in blocks if words[0] in forms.WORDS)
        head, *cells = (words for words in blocks if words is not names)
        rows = {name: words for name, *words in cells}
        assert (tuple(head), tuple(rows)) == (forms.COLUMNS, forms.ROWS)
        assert len(page.questions) == 3 + forms.NUM_CELLS
        for question in page.questions:
            assert question.answer in question.read.split()
            assert any(question.read in line for line in page.lines)
            if question.kind in ("date", "total"):
                assert question.answer == first[1 + 2 * (question.kind == "date")]
            elif question.kind == "largest":
                largest.append(names.index(question.answer))
            else:
                row, column = question.text.removeprefix("What is in row ").removesuffix("?").split(", column ")
                assert rows[row][head.index(column)] == question.answer
                assert question.read.split() == [row, *rows[row]]
    assert orders == {forms.NUM_BARS, len(forms.COLUMNS)}  # the chart above the table, or below it
    assert len(set(largest)) > 1


def test_a_forms_largest_bar_is_the_one_asked_for() -> None:
    """Read off the pixels: in which column of the form the bars' colour stands most often."""
    for seed in range(6):
        page = forms.form(random.Random(seed))
        pixels = np.asarray(page.image).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
        colours, counts = np.unique(pixels, return_counts=True)
        is_bar = pixels == colours[np.argsort(counts)[-2]]  # after the paper's
        heights = [is_bar[:, left + 30].sum() for left in forms.LEFTS]
        names = next(words for words in map(str.split, page.lines) if words[0] in forms.WORDS)
        answer = next(question.answer for question in page.questions if question.kind == "largest")
        assert answer == names[int(np.argmax(heights))]


def test_some_questions_about_each_form(tmp_path: Path) -> None:
    few = build.FORMS._replace(num_test=8)
    build.build_documents(tmp_path / "forms", 2, collection=few)
    table = pq.read_table(tmp_path / "forms" / "eval" / "documents_form_test.parquet").to_pylist()
    assert [row["type"] for row in table] == 2 * ["total", "date", "largest", "cell"]
    assert len({row["image"]["bytes"] for row in table}) == 2
    for row in json.loads((tmp_path / "forms" / "instruct.json").read_text()):
        assert len(row["conversations"]) == 2 * few.num_questions


def test_words_stand_in_their_boxes() -> None:
    """Nothing but paper and rules is left once all boxes are painted over, and no box is of paper alone."""
    for kind in ("receipt", "letter"):
        page = LAYOUTS[kind](random.Random(5))
        paper = page.image.getpixel((0, 0))
        pixels = np.asarray(page.image).copy()
        inked = (pixels != paper).any(-1)
        for _, (left, top, right, bottom) in page.words:
            box = np.s_[int(top) : int(np.ceil(bottom)) + 1, int(left) : int(np.ceil(right)) + 1]
            assert (pixels[box] != paper).any()
            inked[box] = False
        assert " ".join(word for word, _ in page.words) == " ".join(page.lines)
        assert inked.any(1).sum() <= 2  # rules


def test_a_forms_fields_lie_within_tokens(tmp_path: Path) -> None:
    """Of 3 x 3 a tile in 2 x 2 tiles and in 3 x 3; months, the longest words, within tiles."""
    build.build_documents(tmp_path / "forms", 12, collection=build.FORMS._replace(num_test=4))
    tiles = {200, 300, 400}
    tokens = {place * forms.SIDE / count for count in (6, 9) for place in range(1, count)}
    for row in json.loads((tmp_path / "forms" / "read.json").read_text()):
        words = parse_row(row, "?").words
        assert set(row["conversations"][1]["value"].split()) <= {word.text for word in words}
        for text, (left, top, right, bottom) in words:
            for edge in tiles if text in MONTHS else tokens:
                assert not left < edge < right
                assert not top < edge < bottom
