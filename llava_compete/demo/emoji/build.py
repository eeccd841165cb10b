"""Questions about emoji: three vendors' pictures to learn from, a fourth's and unseen things to be asked about.

Output, below the output folder (the pictures stay where `llava-compete fetch emoji` put them):

    names.json           the name of each training picture                              (pretrain_align)
    captions.json        one picture in three turns (name, kind, colour, style, a sentence), four in a turn each;
                         English                                                        (pft)
    instruct.json        all question types, some in several turns, some of text only   (sft)
    eval/emoji_vendor_test.parquet   things of training, as OpenMoji draws them: a vendor that training never shows
    eval/emoji_new_test.parquet      things that training neither shows nor names, as the three vendors draw them
    eval/emoji_both_test.parquet     those things as OpenMoji draws them
    eval/meta.json                   for each test: rows, chance, blind, SHA-256
    text/train.jsonl, text/validation.jsonl   English: what Python's functions do, and prose of Python's manual

"Things" are those of table.py, which have a name and a kind; colour and style are asked of all emoji, held out alike.

Columns of a test: images (embedded), question, answer, type, id, things (what is drawn). Answers are balanced inside
each type as far as pictures allow. Everything follows from the seeds; the text also from Python's version.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
from llava_compete.demo.emoji.questions import STYLES, WORDING, Asker, Question, description
from llava_compete.demo.emoji.table import (
    KINDS,
    UNSEEN_VENDOR,
    VENDORS,
    Thing,
    held_out,
    read_others,
    read_things,
    with_article,
)
from llava_compete.files import read_json, write_json, write_json_lines

GENERATOR = "10"  # raise when the same settings give other data
TRAIN_SEED, TEST_SEED = 21, 22
NUM_TEXT_ONLY = 400
# Rows of instruct.json by type, beside names.
INSTRUCT = {"kind": 160, "yes_no": 400, "describe": 60, "colour": 160, "same": 700, "odd": 600, "style": 120}
SEVERAL_TURNS, WORDS_ALONE = 60, 20
# Rows of four pictures: a picture costs four tokens and little more, so that a row teaches four times as much.
GALLERIES = {"captions": 1600, "instruct": 200}
IN_GALLERIES = {
    "captions": ("name", "kind", "kind", "colour", "colour", "style", "style"),
    "instruct": ("kind", "yes_no", "colour", "style"),
}
LOOKS = ("colour", "style")  # asked of every emoji
NUM_TEST = 200  # questions of a type, or as many as there are pictures to ask about
TESTS = {
    "emoji_vendor": ("name", "kind", "yes_no", "describe", "colour", "same", "odd"),
    "emoji_new": ("kind", "yes_no", "colour", "style", "same", "odd"),
    "emoji_both": ("kind", "yes_no", "colour", "same", "odd"),
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

    pool = _Pool(folder, things, read_others(folder, things))
    counts = _write_training(partial, pool.askers(new=False, vendors=VENDORS, rng=random.Random(TRAIN_SEED)))
    rng = random.Random(TEST_SEED)
    askers = {
        "emoji_vendor": pool.askers(new=False, vendors=(UNSEEN_VENDOR,), rng=rng),
        "emoji_new": pool.askers(new=True, vendors=VENDORS, rng=rng),
        "emoji_both": pool.askers(new=True, vendors=(UNSEEN_VENDOR,), rng=rng),
    }
    meta: dict[str, Any] = {"generator": GENERATOR, "table": source, "rows": counts, "tasks": {}}
    for task, asks in askers.items():
        rows = [row for kind in TESTS[task] for row in _test_rows(asks.about(kind), kind, NUM_TEST)]
        meta["tasks"][task] = write_test_table(rows, partial / "eval" / f"{task}_test.parquet")
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return DemoSummary(target, counts, built=True)


@dataclass(frozen=True)
class _Askers:
    """things: asks about things with a name. looks: about any emoji."""

    things: Asker
    looks: Asker

    def about(self, kind: str) -> Asker:
        return self.looks if kind in LOOKS else self.things


@dataclass(frozen=True)
class _Pool:
    """What there is to ask about."""

    folder: Path
    things: list[Thing]
    others: list[Thing]

    def askers(self, new: bool, vendors: tuple[str, ...], rng: random.Random) -> _Askers:
        """On things that training never shows, if `new`, else on the rest, as `vendors` draw them."""
        hidden = held_out(self.things) | held_out(self.others)
        things = [thing for thing in self.things if (thing.name in hidden) == new]
        others = [thing for thing in self.others if (thing.name in hidden) == new]
        second = vendors if vendors == VENDORS else (*VENDORS, UNSEEN_VENDOR)
        return _Askers(
            *(Asker(self.folder, asked_of, vendors, second, rng) for asked_of in (things, [*things, *others]))
        )


def _write_training(out: Path, askers: _Askers) -> dict[str, int]:
    asker = askers.things
    pictures = [(thing, vendor) for thing in asker.things for vendor in VENDORS]
    names = [_row(f"{t.code}-{v}-name", t.images[v], WORDING["name"], t.name) for t, v in pictures]
    turns = [_conversation(asker, t, v, f"{t.code}-{v}-turns") for t, v in pictures]
    galleries = {
        name: [_gallery(askers, IN_GALLERIES[name], f"{name}-gallery-{number:04d}") for number in range(count)]
        for name, count in GALLERIES.items()
    }
    text = function_rows(NUM_TEXT_ONLY)
    english = [
        {"id": f"text-{n:04d}", "conversations": llava_turns([pair], with_image=False)} for n, pair in enumerate(text)
    ]
    captions = turns + galleries["captions"] + english[::2]
    instruct = (
        names
        + _asked(askers, INSTRUCT, "instruct")
        + asker.rng.sample(turns, SEVERAL_TURNS)
        + galleries["instruct"]
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


def _asked(askers: _Askers, counts: dict[str, int], name: str) -> list[dict[str, Any]]:
    return [
        _row(f"{name}-{kind}-{number:04d}", question.images, question.text, question.said)
        for kind, count in counts.items()
        for number in range(count)
        for question in [askers.about(kind).ask(kind)]
    ]


def _conversation(asker: Asker, thing: Thing, vendor: str, name: str) -> dict[str, Any]:
    """Three of what one picture is asked, in any order: what comes later is read off the earlier in part."""
    image = thing.images[vendor]
    said = {"name": thing.name, "kind": thing.kind, "describe": description(thing), "style": STYLES[vendor]}
    if colour := asker.colour(image):
        said["colour"] = colour
    turns = [(WORDING[kind], said[kind]) for kind in asker.rng.sample(sorted(said), 3)]
    return {"id": name, "image": image, "conversations": llava_turns(turns)}


def _gallery(askers: _Askers, types: Sequence[str], name: str) -> dict[str, Any]:
    """Four pictures, one after the other, each with a question of its own, of one of the `types`."""
    kinds = askers.things.rng.choices(types, k=4)
    questions = [askers.about(kind).ask(kind) for kind in kinds]
    turns = llava_turns([(question.text, question.said) for question in questions])
    for turn in turns[2::2]:
        turn["value"] = f"<image>\n{turn['value']}"
    return {"id": name, "image": [question.images[0] for question in questions], "conversations": turns}


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
