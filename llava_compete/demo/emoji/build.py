"""Questions about emoji: three vendors' pictures to learn from, a fourth's and unseen things to be asked about.

Output, below the output folder (the pictures stay where `llava-compete fetch emoji` put them):

    names.json           the name of each training picture                              (pretrain_align)
    captions.json        name, kind, colour, a sentence: three of them in turns; English (pft)
    instruct.json        all question types, some in several turns, some of text only   (sft)
    eval/emoji_vendor_test.parquet   things of training, as OpenMoji draws them: a vendor that training never shows
    eval/emoji_new_test.parquet      things that training neither shows nor names, as the three vendors draw them
    eval/emoji_both_test.parquet     those things as OpenMoji draws them
    eval/meta.json                   for each test: rows, chance, blind, SHA-256
    text/train.jsonl, text/validation.jsonl   English: what Python's functions do, and prose of Python's manual

Columns of a test: images (embedded), question, answer, type, id, things (what is drawn). Answers are balanced inside
each type as far as pictures allow. Everything follows from the seeds; the text also from Python's version.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from llava_compete.demo.build import (
    DemoSummary,
    llava_turns,
    refuse_foreign_folder,
    write_llava_json,
    write_test_table,
)
from llava_compete.demo.emoji.python_text import function_rows, manual_prose
from llava_compete.demo.emoji.questions import WORDING, Asker, Question, description
from llava_compete.demo.emoji.table import KINDS, UNSEEN_VENDOR, VENDORS, Thing, held_out, read_things, with_article
from llava_compete.files import read_json, write_json, write_json_lines

GENERATOR = "7"  # raise when the same settings give other data
TRAIN_SEED, TEST_SEED = 21, 22
NUM_TEXT_ONLY = 160
# Rows of instruct.json by type, beside names.
INSTRUCT = {"kind": 120, "yes_no": 300, "describe": 60, "colour": 240, "same": 360, "odd": 240, "style": 120}
SEVERAL_TURNS, WORDS_ALONE = 60, 20
TESTS = {
    "emoji_vendor": dict.fromkeys(("name", "kind", "yes_no", "describe", "colour", "same", "odd"), 80),
    "emoji_new": dict.fromkeys(("kind", "yes_no", "colour", "same", "odd", "style"), 80),
    "emoji_both": dict.fromkeys(("kind", "yes_no", "colour", "same", "odd"), 80),
}


def build_emoji(out_dir: str | Path, pictures: str | Path, force: bool = False) -> DemoSummary:
    """Build in `out_dir` from the fetched folder `pictures`; keeps a complete copy of the same unless `force`."""
    target, folder = Path(out_dir), Path(pictures)
    things = read_things(folder)
    source = hashlib.sha256((folder / "emoji.json").read_bytes()).hexdigest()
    meta_file = target / "eval" / "meta.json"
    if meta_file.is_file() and not force:
        there = read_json(meta_file)
        if (there.get("generator"), there.get("table")) == (GENERATOR, source):
            return DemoSummary(target, there["rows"], built=False)
    refuse_foreign_folder(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("eval", "text"):
        (partial / name).mkdir(parents=True)

    unseen = held_out(things)
    seen = [thing for thing in things if thing.name not in unseen]
    new = [thing for thing in things if thing.name in unseen]
    asker = Asker(folder, seen, VENDORS, VENDORS, random.Random(TRAIN_SEED))
    counts = _write_training(partial, asker)
    every_vendor = (*VENDORS, UNSEEN_VENDOR)
    rng = random.Random(TEST_SEED)
    askers = {
        "emoji_vendor": Asker(folder, seen, (UNSEEN_VENDOR,), every_vendor, rng),
        "emoji_new": Asker(folder, new, VENDORS, VENDORS, rng),
        "emoji_both": Asker(folder, new, (UNSEEN_VENDOR,), every_vendor, rng),
    }
    meta: dict[str, Any] = {"generator": GENERATOR, "table": source, "rows": counts, "tasks": {}}
    for task, asker in askers.items():
        rows = [row for kind, count in TESTS[task].items() for row in _test_rows(asker, kind, count)]
        meta["tasks"][task] = write_test_table(rows, partial / "eval" / f"{task}_test.parquet")
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return DemoSummary(target, counts, built=True)


def _write_training(out: Path, asker: Asker) -> dict[str, int]:
    pictures = [(thing, vendor) for thing in asker.things for vendor in VENDORS]
    names = [_row(f"{t.code}-{v}-name", t.images[v], WORDING["name"], t.name) for t, v in pictures]
    turns = [_conversation(asker, t, t.images[v], f"{t.code}-{v}-turns") for t, v in pictures]
    text = function_rows(NUM_TEXT_ONLY)
    english = [
        {"id": f"text-{n:04d}", "conversations": llava_turns([pair], with_image=False)} for n, pair in enumerate(text)
    ]
    captions = turns + english[::2]
    instruct = (
        names
        + _asked(asker, INSTRUCT, "instruct")
        + asker.rng.sample(turns, SEVERAL_TURNS)
        + [_text_row(asker, number) for number in range(WORDS_ALONE)]
        + english[1::2]
    )
    counts = {}
    for name, rows in (("names", names), ("captions", captions), ("instruct", instruct)):
        random.Random(TRAIN_SEED).shuffle(rows)
        counts[name] = write_llava_json(rows, out / f"{name}.json")
    write_json_lines(out / "text" / "train.jsonl", ({"text": f"{ask} {said}"} for ask, said in text))
    write_json_lines(out / "text" / "validation.jsonl", ({"text": text} for text in manual_prose()))
    return counts


def _row(name: str, image: str | tuple[str, ...], question: str, said: str) -> dict[str, Any]:
    images = [image] if isinstance(image, str) else list(image)
    turns = llava_turns([(question, said)])
    turns[0]["value"] = "<image>\n" * (len(images) - 1) + turns[0]["value"]
    return {"id": name, "image": images[0] if len(images) == 1 else images, "conversations": turns}


def _asked(asker: Asker, counts: dict[str, int], name: str) -> list[dict[str, Any]]:
    return [
        _row(f"{name}-{kind}-{number:04d}", question.images, question.text, question.said)
        for kind, count in counts.items()
        for number in range(count)
        for question in [asker.ask(kind)]
    ]


def _conversation(asker: Asker, thing: Thing, image: str, name: str) -> dict[str, Any]:
    """Three of name, kind, colour and a sentence, in any order: what comes later is read off the earlier in part."""
    colour = asker.colour(image)
    said = {"name": thing.name, "kind": thing.kind, "describe": description(thing)} | (
        {"colour": colour} if colour else {}
    )
    turns = [(WORDING[kind], said[kind]) for kind in asker.rng.sample(sorted(said), 3)]
    return {"id": name, "image": image, "conversations": llava_turns(turns)}


def _text_row(asker: Asker, number: int) -> dict[str, Any]:
    """A question on a thing without its picture."""
    thing = asker.draw()
    kind = asker.rng.choice([thing.kind, asker.rng.choice(sorted(KINDS))])
    answer = "yes" if kind == thing.kind else "no"
    verb = "Are" if thing.is_plural else "Is"
    turns = llava_turns([(f"{verb} {thing.article} {with_article(kind)}?", answer)], with_image=False)
    return {"id": f"word-{number:04d}", "conversations": turns}


def _test_rows(asker: Asker, kind: str, count: int) -> list[dict[str, Any]]:
    """`count` different questions of a type, their answers in turn, so that none is much more frequent than another."""
    by_answer: dict[str, dict[Question, None]] = defaultdict(dict)
    for _ in range(count * 12):
        question = asker.ask(kind)
        by_answer[question.answer][question] = None
    waiting = [list(questions) for _, questions in sorted(by_answer.items())]
    asker.rng.shuffle(waiting)
    chosen: list[Question] = []
    while len(chosen) < count and any(waiting):
        chosen += [questions.pop(0) for questions in waiting if questions]
    names = {image: thing.name for thing in asker.things for image in thing.images.values()}
    return [
        {
            "images": [(asker.folder / image).read_bytes() for image in question.images],
            "question": question.text,
            "answer": question.answer,
            "type": kind,
            "id": f"{kind}-{number:03d}",
            "things": ", ".join(names[image] for image in question.images),
        }
        for number, question in enumerate(chosen[:count])
    ]
