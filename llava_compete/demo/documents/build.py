"""Pages of small print and questions about them: what pictures in tiles are for.

Four kinds of page of 600 to 1,200 pixels a side, all text 8 to 12 pixels high (`layouts`). Output, below the output
folder:

    read.json       pages, the first lines of their text, all words and their boxes (pretrain_align)
    instruct.json   two questions a page, one after the other                      (sft)
    images/         the pages of training
    eval/documents_{receipt,table,chart,letter}_test.parquet    a page and a question a row
    eval/meta.json  rows, chance, blind and SHA-256 of each test; SHA-256 of the training files and of the fonts

`FORMS` are the same of filled forms (`forms`): five questions a page in instruct.json, one test, documents_form.

Columns of a test: image (embedded), question, answer, type, id. Everything follows from the seeds, page by page; pixels
also from the fonts' version and Pillow's.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llava_compete.demo.build import (
    DemoSummary,
    llava_turns,
    png_bytes,
    refuse_foreign_folder,
    write_llava_json,
    write_test_table,
)
from llava_compete.demo.documents.forms import form
from llava_compete.demo.documents.layouts import LAYOUTS, Page
from llava_compete.demo.documents.paper import Question, fonts_digest
from llava_compete.files import read_json, write_json

GENERATOR = "3"  # raise when the same settings give other data
TRAIN_SEED, TEST_SEED = 31, 32


class Collection(NamedTuple):
    """Pages of some kinds, and what is asked about them.

    layouts: kind -> what draws a page; tested: of each kind the types asked for in its test, in turn; training asks
        for all; num_questions: of a page of training; num_test: questions of a test; per_page: of them about one page.
    read_lines: of the page's text, what its first stage reads.
    """

    name: str
    layouts: dict[str, Callable[[random.Random], Page]]
    tested: dict[str, tuple[str, ...]]
    read_prompt: str
    read_lines: int
    num_questions: int
    num_test: int = 200
    per_page: int = 1


PAGES = Collection(
    "pages",
    dict(LAYOUTS),
    {"receipt": ("total", "date"), "table": ("cell",), "chart": ("largest",), "letter": ("total", "date")},
    read_prompt="Read the first lines.",
    read_lines=6,
    num_questions=2,
)
FORMS = Collection(
    "forms",
    {"form": form},
    {"form": ("total", "date", "largest", "cell")},
    read_prompt="Read it.",
    read_lines=7,
    num_questions=5,
    num_test=480,
    per_page=4,
)


def build_documents(
    out_dir: str | Path, train_pages: int, force: bool = False, collection: Collection = PAGES
) -> DemoSummary:
    """Build a collection in `out_dir`; a complete copy of the same generator, fonts and size is kept unless `force`.

    Raises:
        UserError: no fonts, or a folder of something else.
    """
    target, identity = Path(out_dir), f"{collection.name}/{GENERATOR}/{train_pages}/{fonts_digest()}"
    meta_file = target / "eval" / "meta.json"
    if meta_file.is_file() and not force:
        there = read_json(meta_file)
        if there.get("generator") == identity:
            return DemoSummary(target, there["rows"], built=False)
    refuse_foreign_folder(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("images", "eval"):
        (partial / name).mkdir(parents=True)
    counts = _write_training(partial, train_pages, collection)
    tasks = {}
    for number, kind in enumerate(collection.layouts):
        rows = _test_rows(kind, TEST_SEED + number, collection)
        tasks[f"documents_{kind}"] = write_test_table(rows, partial / "eval" / f"documents_{kind}_test.parquet")
    checksums = {f"{name}.json": _sha256([partial / f"{name}.json"]) for name in counts}
    checksums["images"] = _sha256(sorted((partial / "images").iterdir()))
    meta = {"generator": identity, "rows": counts, "sha256": checksums, "tasks": tasks}
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return DemoSummary(target, counts, built=True)


def _write_training(out: Path, count: int, collection: Collection) -> dict[str, int]:
    read, instruct = [], []
    kinds = list(collection.layouts)
    for number in tqdm(range(count), desc="pages", unit="page", disable=None):
        rng = random.Random(f"{TRAIN_SEED}/{number}")
        page = collection.layouts[kinds[number % len(kinds)]](rng)
        name = f"{number:06d}.png"
        (out / "images" / name).write_bytes(png_bytes(page.image))
        row = {"id": f"page-{number:06d}", "image": name}
        turns = [(collection.read_prompt, "\n".join(page.lines[: collection.read_lines]))]
        words = [{"text": text, "box": list(box)} for text, box in page.words]
        read.append({**row, "conversations": llava_turns(turns), "page_words": words})
        asked = rng.sample(page.questions, min(collection.num_questions, len(page.questions)))
        turns = [(question.text, question.said) for question in asked]
        instruct.append({**row, "conversations": llava_turns(turns)})
    return {
        "read": write_llava_json(read, out / "read.json"),
        "instruct": write_llava_json(instruct, out / "instruct.json"),
    }


def _test_rows(kind: str, seed: int, collection: Collection) -> list[dict[str, Any]]:
    """Some questions a page, the types in turn; no page is one of training, whose seeds are others."""
    rows = []
    types, per_page = collection.tested[kind], collection.per_page
    for number in tqdm(range(collection.num_test // per_page), desc=f"test pages, {kind}", unit="page", disable=None):
        page = collection.layouts[kind](random.Random(f"{seed}/{number}"))
        image = png_bytes(page.image)
        for place in range(number * per_page, (number + 1) * per_page):
            question = _first(page.questions, types[place % len(types)])
            rows.append(
                {
                    "image": image,
                    "question": question.text,
                    "answer": question.answer,
                    "type": question.kind,
                    "id": f"{kind}-{place:03d}",
                }
            )
    return rows


def _first(questions: list[Question], kind: str) -> Question:
    return next(question for question in questions if question.kind == kind)


def _sha256(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()
