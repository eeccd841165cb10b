"""Pages of small print and questions about them: what pictures in tiles are for.

Four kinds of page of 600 to 1,200 pixels a side, all text 8 to 12 pixels high (`layouts`). Output, below the output
folder:

    read.json       pages and the first lines of their text                        (pretrain_align)
    instruct.json   two questions a page, one after the other                      (sft)
    images/         the pages of training
    eval/documents_{receipt,table,chart,letter}_test.parquet    a page and a question a row
    eval/meta.json  rows, chance, blind and SHA-256 of each test; SHA-256 of the training files and of the fonts

Columns of a test: image (embedded), question, answer, type, id. Everything follows from the seeds, page by page; pixels
also from the fonts' version and Pillow's.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_compete.demo.build import (
    DemoSummary,
    llava_turns,
    png_bytes,
    refuse_foreign_folder,
    write_llava_json,
    write_test_table,
)
from llava_compete.demo.documents.layouts import LAYOUTS
from llava_compete.demo.documents.paper import fonts_digest
from llava_compete.files import read_json, write_json

GENERATOR = "1"  # raise when the same settings give other data
TRAIN_SEED, TEST_SEED = 31, 32
NUM_TEST = 200  # questions of each kind of page
READ_PROMPT, READ_LINES = "Read the first lines.", 6
# Types asked for in tests, in turn; training asks for all.
TESTED = {"receipt": ("total", "date"), "table": ("cell",), "chart": ("largest",), "letter": ("total", "date")}


def build_documents(out_dir: str | Path, train_pages: int, force: bool = False) -> DemoSummary:
    """Build in `out_dir`; a complete copy of the same generator, fonts and size is kept unless `force`.

    Raises:
        UserError: no fonts, or a folder of something else.
    """
    target, identity = Path(out_dir), f"{GENERATOR}/{train_pages}/{fonts_digest()}"
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
    counts = _write_training(partial, train_pages)
    tasks = {}
    for number, kind in enumerate(LAYOUTS):
        rows = _test_rows(kind, TEST_SEED + number)
        tasks[f"documents_{kind}"] = write_test_table(rows, partial / "eval" / f"documents_{kind}_test.parquet")
    checksums = {f"{name}.json": _sha256([partial / f"{name}.json"]) for name in counts}
    checksums["images"] = _sha256(sorted((partial / "images").iterdir()))
    meta = {"generator": identity, "rows": counts, "sha256": checksums, "tasks": tasks}
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return DemoSummary(target, counts, built=True)


def _write_training(out: Path, count: int) -> dict[str, int]:
    read, instruct = [], []
    kinds = list(LAYOUTS)
    for number in tqdm(range(count), desc="pages", unit="page", disable=None):
        rng = random.Random(f"{TRAIN_SEED}/{number}")
        page = LAYOUTS[kinds[number % len(kinds)]](rng)
        name = f"{number:06d}.png"
        (out / "images" / name).write_bytes(png_bytes(page.image))
        row = {"id": f"page-{number:06d}", "image": name}
        turns = [(READ_PROMPT, "\n".join(page.lines[:READ_LINES]))]
        read.append({**row, "conversations": llava_turns(turns)})
        asked = rng.sample(page.questions, 2)
        turns = [(question.text, question.answer) for question in asked]
        instruct.append({**row, "conversations": llava_turns(turns)})
    return {
        "read": write_llava_json(read, out / "read.json"),
        "instruct": write_llava_json(instruct, out / "instruct.json"),
    }


def _test_rows(kind: str, seed: int) -> list[dict[str, Any]]:
    """A question a page, the types in turn; no page is one of training, whose seeds are others."""
    rows = []
    for number in tqdm(range(NUM_TEST), desc=f"test pages, {kind}", unit="page", disable=None):
        page = LAYOUTS[kind](random.Random(f"{seed}/{number}"))
        wanted = TESTED[kind][number % len(TESTED[kind])]
        question = next(question for question in page.questions if question.kind == wanted)
        rows.append(
            {
                "image": png_bytes(page.image),
                "question": question.text,
                "answer": question.answer,
                "type": question.kind,
                "id": f"{kind}-{number:03d}",
            }
        )
    return rows


def _sha256(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()
