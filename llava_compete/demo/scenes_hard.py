"""The harder benchmark: compositional questions about crowded scenes, at three levels, and unseen combinations.

Objects (colour × shape, or a scanned digit on
a coloured tile) lie in different cells of a 4×4 grid. Output, below the output folder:

    pretrain.json, instruct.json      LLaVA JSON: captions with places, and several questions an image, of all levels
    images/                           the training scenes
    eval/hard_{1,2,3}_test.parquet    one question a scene: image, question, answer, type, id
    eval/hard_unseen_test.parquet     questions that name a colour-shape pair which training never shows or names
    eval/meta.json                    rows, chance, blind and SHA-256 of each test

Levels: 1 one object (colour, shape, existence, one relation); 2 sets (counting by attribute, comparing counts,
extremes, reading a digit); 3 compositions (two relations at once, counting by relation, same attribute at two places,
sums of digits). Answers are balanced inside each type. Everything follows from the seeds.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from llava_compete.demo import build as demo
from llava_compete.files import read_json, write_json

GENERATOR = "2"  # raise when the same settings give other data
IMAGE_SIZE, GRID = 64, 4
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
# One pair of each shape is never drawn in training scenes.
UNSEEN = {("red", "triangle"), ("green", "square"), ("purple", "circle"), ("yellow", "cross")}
NUM_TEST = 600
TRAIN_SEED, TEST_SEED = 11, 12
DIGIT_SHARE = 0.5  # of scenes that hold digits
YES_NO = ("yes", "no")
CAPTION_PROMPT = "List the objects and their places."


class Thing(NamedTuple):
    """One object in cell (column, row); a digit has `digit` set and is no shape of `SHAPES`."""

    color: str
    shape: str
    column: int
    row: int
    radius: int
    digit: int | None = None
    scan: int = 0  # which scan of the digit

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def caption_name(self) -> str:
        return self.name if self.digit is None else f"{self.color} {self.digit}"

    @property
    def place(self) -> str:
        """Column and row, counted from 1 at the top left."""
        return f"{self.column + 1},{self.row + 1}"


Scene = tuple[Thing, ...]
Answered = tuple[str, str] | None  # question and answer, or None if the scene allows no such question
Asker = Callable[[random.Random, Scene], Answered]


def sample_scene(rng: random.Random, unseen: bool = False) -> Scene:
    """Three to six objects, no two of one name; with `unseen`, at least one of the pairs kept from training."""
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    seen = [pair for pair in pairs if pair not in UNSEEN]
    count = rng.randint(3, 6)
    chosen = rng.sample(seen, count)
    if unseen:
        chosen[0] = rng.choice(sorted(UNSEEN))
    cells = rng.sample([(column, row) for column in range(GRID) for row in range(GRID)], count + 2)
    things = [Thing(*pair, *cell, rng.randint(5, 7)) for pair, cell in zip(chosen, cells, strict=False)]
    if rng.random() < DIGIT_SHARE:
        colors = rng.sample(list(COLORS), 2)
        for color, cell in zip(colors, cells[count:], strict=True):
            things.append(Thing(color, "digit", *cell, 7, rng.randint(0, 9), rng.randrange(1000)))
    return tuple(things)


def render(scene: Scene, scans: dict[int, list[np.ndarray]]) -> Image.Image:
    """RGB image of `IMAGE_SIZE`; `scans` holds 8×8 grey scans (0 to 16) of each digit."""
    scale, cell = 4, IMAGE_SIZE // GRID
    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, (238, 238, 238))
    draw = ImageDraw.Draw(image)
    for thing in scene:
        x, y, r = ((value + 0.5) * cell * scale for value in (thing.column, thing.row, 0))
        r = thing.radius * scale
        fill = COLORS[thing.color]
        if thing.digit is not None:
            choices = scans[thing.digit]
            stroke = Image.fromarray((choices[thing.scan % len(choices)] * (255 / 16)).astype(np.uint8))
            mask = stroke.resize((2 * r, 2 * r), Image.Resampling.BILINEAR)
            draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
            image.paste((255, 255, 255), (int(x - r), int(y - r)), mask)
        elif thing.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif thing.shape == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif thing.shape == "triangle":
            draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
        else:
            arm = r // 3
            draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def caption(scene: Scene) -> str:
    """All objects with their places, in reading order: every word can only be learnt from the image."""
    things = sorted(scene, key=lambda thing: (thing.row, thing.column))
    return "; ".join(f"{thing.caption_name} at {thing.place}" for thing in things)


def describe(rng: random.Random, scene: Scene) -> list[tuple[str, str]]:
    """Where two objects lie, what lies at two places, and last the caption, which would give those answers away."""
    names = Counter(thing.caption_name for thing in scene)
    unique = [thing for thing in scene if names[thing.caption_name] == 1]
    at = [(f"What is at {thing.place}?", thing.caption_name) for thing in rng.sample(scene, min(2, len(scene)))]
    of = [(f"Where is the {thing.caption_name}?", thing.place) for thing in rng.sample(unique, min(2, len(unique)))]
    return [*of, *at, (CAPTION_PROMPT, caption(scene))]


def shapes_of(scene: Scene) -> list[Thing]:
    """Objects that are no digits."""
    return [thing for thing in scene if thing.digit is None]


def digits_of(scene: Scene) -> list[Thing]:
    """Objects that are digits."""
    return [thing for thing in scene if thing.digit is not None]


class Relation(NamedTuple):
    """A place relative to another object, strict."""

    words: str
    holds: Callable[[Thing, Thing], bool]


RELATIONS = (
    Relation("left of", lambda one, other: one.column < other.column),
    Relation("right of", lambda one, other: one.column > other.column),
    Relation("above", lambda one, other: one.row < other.row),
    Relation("below", lambda one, other: one.row > other.row),
)
_ENDS: dict[str, Callable[[Thing], int]] = {
    "leftmost": lambda thing: -thing.column,
    "rightmost": lambda thing: thing.column,
    "topmost": lambda thing: -thing.row,
    "lowest": lambda thing: thing.row,
}


def _only(things: Sequence[Thing]) -> Thing | None:
    return things[0] if len(things) == 1 else None


def _ask_color(rng: random.Random, scene: Scene) -> Answered:
    shape = rng.choice(SHAPES)
    thing = _only([thing for thing in scene if thing.shape == shape])
    return thing and (f"What color is the {shape}?", thing.color)


def _ask_shape(rng: random.Random, scene: Scene) -> Answered:
    color = rng.choice(list(COLORS))
    thing = _only([thing for thing in scene if thing.color == color])
    return (f"What shape is the {color} object?", thing.shape) if thing and thing.digit is None else None


def _ask_existence(rng: random.Random, scene: Scene) -> Answered:
    name = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
    return f"Is there a {name}?", "yes" if any(thing.name == name for thing in scene) else "no"


def _ask_relation(rng: random.Random, scene: Scene) -> Answered:
    one, other = rng.sample(shapes_of(scene), 2)
    relation = rng.choice(RELATIONS)
    return f"Is the {one.name} {relation.words} the {other.name}?", "yes" if relation.holds(one, other) else "no"


def _ask_count(rng: random.Random, scene: Scene) -> Answered:
    if rng.random() < 0.5:
        color = rng.choice(list(COLORS))
        return f"How many {color} objects are there?", str(sum(thing.color == color for thing in scene))
    shape = rng.choice(SHAPES)
    return f"How many {shape} objects are there?", str(sum(thing.shape == shape for thing in scene))


def _ask_compare(rng: random.Random, scene: Scene) -> Answered:
    words, key = rng.choice(((list(COLORS), "color"), (list(SHAPES), "shape")))
    one, other = rng.sample(words, 2)
    counts = [sum(getattr(thing, key) == word for thing in scene) for word in (one, other)]
    return f"Are there more {one} than {other} objects?", "yes" if counts[0] > counts[1] else "no"


def _end(scene: Scene, end: str) -> Thing | None:
    best = max(map(_ENDS[end], scene))
    return _only([thing for thing in scene if _ENDS[end](thing) == best])


def _ask_extreme(rng: random.Random, scene: Scene) -> Answered:
    end = rng.choice(list(_ENDS))
    thing = _end(scene, end)
    return thing and (f"What color is the {end} object?", thing.color)


def _ask_digit(rng: random.Random, scene: Scene) -> Answered:
    digits = digits_of(scene)
    thing = rng.choice(digits) if digits else None
    return thing and (f"Which digit is on the {thing.color} tile?", str(thing.digit))


def _ask_two_relations(rng: random.Random, scene: Scene) -> Answered:
    one, other = rng.sample(shapes_of(scene), 2)
    across, along = rng.choice(RELATIONS[:2]), rng.choice(RELATIONS[2:])
    rest = [thing for thing in scene if thing not in (one, other)]
    thing = _only([item for item in rest if across.holds(item, one) and along.holds(item, other)])
    words = f"{across.words} the {one.name} and {along.words} the {other.name}"
    return thing and (f"What color is the object {words}?", thing.color)


def _ask_count_relation(rng: random.Random, scene: Scene) -> Answered:
    one, relation = rng.choice(shapes_of(scene)), rng.choice(RELATIONS)
    count = sum(relation.holds(thing, one) for thing in scene)
    return f"How many objects are {relation.words} the {one.name}?", str(count)


def _ask_same(rng: random.Random, scene: Scene) -> Answered:
    ends = rng.sample(list(_ENDS), 2)
    one, other = (_end(scene, end) for end in ends)
    if one is None or other is None or one == other:
        return None
    same = "yes" if one.color == other.color else "no"
    return f"Do the {ends[0]} and the {ends[1]} object have the same color?", same


def _ask_sum(rng: random.Random, scene: Scene) -> Answered:
    digits = [thing.digit for thing in scene if thing.digit is not None]
    return ("What is the sum of the digits?", str(sum(digits))) if len(digits) == 2 else None


class Kind(NamedTuple):
    """A type of question: its level, and the answers that tests hold in equal numbers."""

    level: int
    ask: Asker
    answers: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "color": Kind(1, _ask_color, tuple(COLORS)),
    "shape": Kind(1, _ask_shape, SHAPES),
    "existence": Kind(1, _ask_existence, YES_NO),
    "relation": Kind(1, _ask_relation, YES_NO),
    "count": Kind(2, _ask_count, ("0", "1", "2", "3")),
    "compare": Kind(2, _ask_compare, YES_NO),
    "extreme": Kind(2, _ask_extreme, tuple(COLORS)),
    "digit": Kind(2, _ask_digit, tuple(map(str, range(10)))),
    "two_relations": Kind(3, _ask_two_relations, tuple(COLORS)),
    "count_relation": Kind(3, _ask_count_relation, ("0", "1", "2", "3", "4")),
    "same": Kind(3, _ask_same, YES_NO),
    "sum": Kind(3, _ask_sum, tuple(map(str, range(2, 17)))),
}


def names_unseen(text: str) -> bool:
    """Whether a question names a pair that is kept from training."""
    return any(f"{color} {shape}" in text for color, shape in UNSEEN)


def sample_conversation(rng: random.Random, scene: Scene, turns: int) -> list[tuple[str, str]]:
    """Up to `turns` different questions; each first draws the answer it wants, so that training is balanced too."""
    asked: dict[str, str] = {}
    for _ in range(4 * turns):
        if len(asked) == turns:
            break
        kind = KINDS[rng.choice(list(KINDS))]
        wanted = rng.choice(kind.answers)
        for _ in range(4):
            answered = kind.ask(rng, scene)
            if answered is not None and answered[1] == wanted and not names_unseen(answered[0]):
                asked.setdefault(*answered)
                break
    return list(asked.items())


def sample_test(
    rng: random.Random, kinds: Sequence[str], count: int, unseen: bool, taken: Set[frozenset[Thing]] = frozenset()
) -> list[tuple[Scene, str, str, str]]:
    """(scene, question, answer, kind) with equal numbers of each kind, and of each answer in a kind (±1).

    No scene is one of `taken` (the training scenes), nor like another one.
    """
    picked, asked, used = [], dict.fromkeys(kinds, 0), set(taken)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        wanted = KINDS[kind].answers[asked[kind] % len(KINDS[kind].answers)]
        asked[kind] += 1
        while True:
            scene = sample_scene(rng, unseen)
            answered = KINDS[kind].ask(rng, scene)
            if answered is None or answered[1] != wanted or frozenset(scene) in used:
                continue
            if names_unseen(answered[0]) is unseen:
                break
        used.add(frozenset(scene))
        picked.append((scene, *answered, kind))
    return picked


def build_scenes_hard(out_dir: str | Path, train_images: int, force: bool = False) -> demo.DemoSummary:
    """Build the benchmark in `out_dir`; a complete copy of the same generator and size is kept unless `force`."""
    target = Path(out_dir)
    identity = f"{GENERATOR}/{train_images}"
    meta_file = target / "eval" / "meta.json"
    if meta_file.is_file() and not force:
        meta = read_json(meta_file)
        if meta.get("generator") == identity:
            return demo.DemoSummary(target, meta["rows"], built=False)
    demo.refuse_foreign_folder(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    (partial / "eval").mkdir()
    train_scans, test_scans = demo.digit_scans()

    rng, caption_rng = random.Random(TRAIN_SEED), random.Random(TRAIN_SEED + 2)
    captions, rows, seen = [], [], set()
    for index in range(train_images):
        scene = sample_scene(rng)
        seen.add(frozenset(scene))
        name = f"{index:06d}.png"
        (partial / "images" / name).write_bytes(demo.png_bytes(render(scene, train_scans)))
        row = {"id": f"hard-{index:06d}", "image": name}
        captions.append({**row, "conversations": demo.llava_turns(describe(caption_rng, scene))})
        pairs = sample_conversation(rng, scene, rng.choice((1, 4, 6)))
        if pairs:
            rows.append({**row, "conversations": demo.llava_turns(pairs)})
    counts = {
        "pretrain": demo.write_llava_json(captions, partial / "pretrain.json"),
        "instruct": demo.write_llava_json(rows, partial / "instruct.json"),
    }
    tests = {f"hard_{level}": ([k for k in KINDS if KINDS[k].level == level], False) for level in (1, 2, 3)}
    tests["hard_unseen"] = (["existence", "relation", "two_relations", "count_relation"], True)
    tasks = {}
    for number, (task, (kinds, unseen)) in enumerate(tests.items()):
        picked = sample_test(random.Random(TEST_SEED + number), kinds, NUM_TEST, unseen, seen)
        table = [
            {
                "image": demo.png_bytes(render(scene, test_scans)),
                "question": question,
                "answer": answer,
                "type": kind,
                "id": f"{task}-{index:04d}",
            }
            for index, (scene, question, answer, kind) in enumerate(picked)
        ]
        tasks[f"demo_{task}"] = demo.write_test_table(table, partial / "eval" / f"{task}_test.parquet")
    meta = {"generator": identity, "rows": counts, "tasks": tasks}
    write_json(partial / "eval" / "meta.json", meta)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return demo.DemoSummary(target, counts, built=True)
