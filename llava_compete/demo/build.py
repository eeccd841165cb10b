"""The demo data: real scans of digits and rendered scenes, in LLaVA's own format, in a few seconds.

Layout below the output folder:

    pretrain.json            captions (stage 1), LLaVA JSON
    instruct.json            instructions (stage 2): several turns, and some rows of text only
    images/{digits,scenes}/  PNG files named in the JSON
    eval/digits_test.parquet eval/scenes_test.parquet   400 questions each: image (embedded), question, answer, type
    eval/meta.json           for each test: rows, chance (best constant answer), blind (best answer by type), SHA-256

The digits are scikit-learn's 1,797 scans, split 1,397/400 by a fixed permutation; train and test scenes come from
separate seeds, and a test scene never equals a training scene. Output is deterministic, and is written beside the
target and renamed, so that a killed build leaves nothing half-made.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_compete.demo import scenes
from llava_compete.errors import UserError
from llava_compete.files import read_json, write_json

log = logging.getLogger(__name__)

NUM_TEST = 400
TRAIN_SEED, TEST_SEED, DIGIT_SEED = 1, 2, 0
NUM_CAPTION_SCENES = 2000
NUM_INSTRUCT_SCENES = 5000
NUM_TEXT_ONLY = 300
GENERATOR = "5"  # raise when the same settings give other data
DIGIT_QUESTION = "Which digit is this?"
DESCRIBE_PROMPT = "Describe the image."
DIGIT_CAPTION_PROMPTS = ("What is this?", DESCRIBE_PROMPT)
# Captions are asked for in the words of the later questions: the demo's tokenizer is trained on them.
CAPTION_PROMPTS = (
    "Which objects are there, from left to right?",
    "What color and shape is each object, from left to right?",
    DESCRIBE_PROMPT,
)


@dataclass(frozen=True)
class DemoSummary:
    """What `build_demo` left on disk; `built` is False when a complete copy was already there."""

    directory: Path
    rows: dict[str, int]
    built: bool


def build_demo(out_dir: str | Path, force: bool = False) -> DemoSummary:
    """Build the demo data in `out_dir`; keeps a complete copy made by the same generator unless `force`."""
    target = Path(out_dir)
    meta_file = target / "eval" / "meta.json"
    if meta_file.is_file() and not force:
        meta = read_json(meta_file)
        if meta.get("generator") == GENERATOR:
            return DemoSummary(target, meta["rows"], built=False)
    refuse_foreign_folder(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "eval").mkdir(parents=True)

    digit_rows, digit_test = _digits(partial / "images")
    scene_rows, captions, seen = _train_scenes(partial / "images")
    digit_captions = [
        {**row, "conversations": llava_turns([(prompt, f"digit {row['answer']}")])}
        for row, prompt in zip(digit_rows, itertools.cycle(DIGIT_CAPTION_PROMPTS), strict=False)
    ]
    pretrain = [*captions, *digit_captions]
    instruct = [
        *scene_rows,
        *({**row, "conversations": llava_turns([(DIGIT_QUESTION, row["answer"])])} for row in digit_rows),
        *_text_only(),
    ]
    for rows in (pretrain, instruct):
        random.Random(TRAIN_SEED).shuffle(rows)
    tests = {"demo_digits": ("digits_test", digit_test), "demo_scenes": ("scenes_test", _test_scenes(seen))}
    counts = {"pretrain": write_llava_json(pretrain, partial / "pretrain.json")}
    counts["instruct"] = write_llava_json(instruct, partial / "instruct.json")
    meta = {"generator": GENERATOR, "rows": counts, "tasks": {}}
    for task, (name, rows) in tests.items():
        meta["tasks"][task] = write_test_table(rows, partial / "eval" / f"{name}.parquet")
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return DemoSummary(target, counts, built=True)


def refuse_foreign_folder(target: Path) -> None:
    """`UserError` if what a build would replace is not a build."""
    if target.exists() and not (target / "eval" / "meta.json").is_file() and not _is_empty_folder(target):
        raise UserError(f"{target}: is there and was not made by this command; name another folder")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def chance_levels(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the best constant answer (`chance`) and of the best answer for each question type (`blind`)."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_type[row["type"]][row["answer"]] += 1
    overall = sum(by_type.values(), Counter[str]())
    return {
        "chance": max(overall.values()) / len(rows),
        "blind": sum(max(counts.values()) for counts in by_type.values()) / len(rows),
    }


def write_test_table(rows: Sequence[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Write rows (image or images, question, answer, type, id, further strings) as parquet; return its facts.

    `image` is the bytes of a file, `images` a list of them.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
    special = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    if "image" in columns:
        columns["image"] = [_embedded(content) for content in columns["image"]]
    else:
        columns["images"] = [[_embedded(content) for content in contents] for contents in columns["images"]]
    kinds = {key: special.get(key, datasets.Value("string")) for key in columns}
    # The features in the schema's metadata make `load_dataset("parquet")` decode the images.
    schema = datasets.Features(kinds).arrow_schema
    pq.write_table(pa.table(columns, schema=schema), path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": sha, "n": len(rows), **chance_levels(rows)}


def _embedded(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def png_bytes(image: Image.Image) -> bytes:
    """Encode as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def llava_turns(pairs: Sequence[tuple[str, str]], with_image: bool = True) -> list[dict[str, str]]:
    """(question, answer) pairs as LLaVA's turns, the image before the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        placeholder = "<image>\n" if with_image and index == 0 else ""
        turns.append({"from": "human", "value": (placeholder + question).strip()})
        turns.append({"from": "gpt", "value": answer})
    return turns


def digit_scans() -> tuple[dict[int, list[np.ndarray]], dict[int, list[np.ndarray]]]:
    """The training and the test scans (8×8, 0 to 16) of each digit, by the fixed split."""
    train: dict[int, list[np.ndarray]] = defaultdict(list)
    test: dict[int, list[np.ndarray]] = defaultdict(list)
    for scan in _split_digits():
        (test if scan.is_test else train)[scan.digit].append(scan.pixels)
    return train, test


class _Scan(NamedTuple):
    number: int  # in scikit-learn's order
    pixels: np.ndarray
    digit: int
    is_test: bool


def _split_digits() -> list[_Scan]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(DIGIT_SEED).permutation(len(digits.target))
    return [
        _Scan(int(index), digits.images[index], int(digits.target[index]), is_test=rank < NUM_TEST)
        for rank, index in enumerate(order)
    ]


def _digits(image_root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the training scans as PNG; return their rows (with `answer`, no turns yet) and the test rows."""
    (image_root / "digits").mkdir(parents=True)
    size = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
    train, test = [], []
    for scan in _split_digits():
        gray = np.round(scan.pixels * (255 / 16)).astype(np.uint8)
        content = png_bytes(Image.fromarray(gray).resize(size, Image.Resampling.BILINEAR).convert("RGB"))
        row = {"id": f"digit-{scan.number:04d}", "answer": str(scan.digit)}
        if scan.is_test:
            test.append({**row, "image": content, "question": DIGIT_QUESTION, "type": "digit"})
            continue
        name = f"digits/{scan.number:04d}.png"
        (image_root / name).write_bytes(content)
        train.append({**row, "image": name})
    return train, test


def _train_scenes(image_root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], set[bytes]]:
    """Write training scenes; return instruction rows, caption rows and the bytes of all images."""
    (image_root / "scenes").mkdir(parents=True)
    rng = random.Random(TRAIN_SEED)
    instruct, captions, seen = [], [], set()
    for index in range(NUM_CAPTION_SCENES + NUM_INSTRUCT_SCENES):
        scene = scenes.sample_scene(rng)
        name, content = f"scenes/{index:05d}.png", png_bytes(scenes.render(scene))
        seen.add(content)
        (image_root / name).write_bytes(content)
        row = {"id": f"scene-{index:05d}", "image": name}
        if index < NUM_CAPTION_SCENES:
            prompt = CAPTION_PROMPTS[index % len(CAPTION_PROMPTS)]
            captions.append({**row, "conversations": llava_turns([(prompt, scenes.caption(scene))])})
            continue
        questions = scenes.sample_conversation(rng, scene, max_turns=rng.choice((1, 4, 5, 6)))
        instruct.append({**row, "conversations": llava_turns([(q.text, q.answer) for q in questions])})
    return instruct, captions, seen


def _test_scenes(seen: set[bytes]) -> list[dict[str, Any]]:
    """Balanced questions about scenes that differ from all of `seen` (PNG files) and from each other."""
    images: dict[scenes.Scene, bytes] = {}

    def accept(scene: scenes.Scene) -> bool:
        content = png_bytes(scenes.render(scene))
        fresh = content not in seen and scene not in images
        if fresh:
            images[scene] = content
        return fresh

    picked = scenes.sample_balanced(random.Random(TEST_SEED), NUM_TEST, accept)
    return [
        {
            "image": images[scene],
            "question": question.text,
            "answer": question.answer,
            "type": question.kind,
            "id": f"scene-test-{index:03d}",
        }
        for index, (scene, question) in enumerate(picked)
    ]


def _text_only() -> list[dict[str, Any]]:
    """Small sums and opposites: rows without an image."""
    rng = random.Random(TRAIN_SEED)
    opposites = {"left": "right", "right": "left", "above": "below", "below": "above", "yes": "no", "no": "yes"}
    rows = []
    for index in range(NUM_TEXT_ONLY):
        pairs = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                word = rng.choice(sorted(opposites))
                pairs.append((f"What is the opposite of {word}?", opposites[word]))
            else:
                a, b = rng.randint(0, 5), rng.randint(0, 4)
                pairs.append((f"How much is {a} plus {b}?", str(a + b)))
        rows.append({"id": f"text-{index:04d}", "conversations": llava_turns(pairs, with_image=False)})
    return rows


def write_llava_json(rows: Sequence[dict[str, Any]], path: Path) -> int:
    """Write id, image, conversations and page_words of each row, one row a line; return how many."""
    keys = ("id", "image", "conversations", "page_words")
    clean = [{key: row[key] for key in keys if key in row} for row in rows]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in clean) + "\n]\n")
    return len(clean)
