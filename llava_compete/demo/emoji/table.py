"""The emoji that the benchmark asks about: things with a name and a kind, and the main colour of each picture.

These are things that one word names and that four vendors draw so that a person knows them at a glance. Of the others
(faces, people, gestures, clocks) only colour and style are asked: their names ("grinning face with smiling eyes",
"four o'clock") hang on details.
"""

from __future__ import annotations

import colorsys
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_compete.errors import UserError
from llava_compete.files import read_json

VENDORS = ("twitter", "google", "fluent")
UNSEEN_VENDOR = "openmoji"
# Kind -> names in the table; "cat face" is a cat too.
KINDS = {
    kind: tuple(names.split())
    for kind, names in {
        "animal": (
            "cat dog horse cow pig elephant penguin owl fish snake butterfly turtle lion tiger monkey fox rabbit bear "
            "panda giraffe camel whale crab octopus spider bat duck deer"
        ),
        "plant": "rose tulip sunflower cactus mushroom shamrock bouquet hibiscus herb lotus hyacinth blossom seedling",
        "food": (
            "pizza banana strawberry hamburger bread carrot egg grapes watermelon broccoli cookie pear pineapple mango "
            "lemon cherries tomato avocado potato taco sandwich doughnut cupcake popcorn"
        ),
        "vehicle": (
            "bus bicycle train tractor rocket airplane helicopter sailboat ambulance motorcycle taxi canoe tram "
            "automobile locomotive ferry ship speedboat skateboard"
        ),
        "building": "house castle church hospital factory stadium mosque school hotel bank hut synagogue",
        "clothing": (
            "dress jeans socks gloves scarf backpack glasses kimono shorts bikini handbag necktie sunglasses goggles "
            "coat t-shirt crown purse sari briefs"
        ),
        "instrument": "guitar violin trumpet saxophone drum accordion banjo flute maracas",
        "tool": (
            "hammer axe wrench screwdriver ladder bomb shield boomerang gear dagger clamp toolbox scissors magnet "
            "broom key pencil paintbrush hook"
        ),
    }.items()
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "grey", "black")


@dataclass(frozen=True)
class Thing:
    """One emoji. `images`: path below the folder of the pictures by vendor."""

    code: str
    name: str
    kind: str
    images: dict[str, str]

    @property
    def article(self) -> str:
        """The name behind its article."""
        return with_article(self.name)

    @property
    def is_plural(self) -> bool:
        """Whether the name is one of several: grapes."""
        return self.article == self.name and self.name.endswith("s")


def read_others(folder: Path, things: list[Thing]) -> list[Thing]:
    """The emoji beside `things`, in the order of the table; their kind is the table's group."""
    there = {thing.code for thing in things}
    entries = [entry for entry in read_json(folder / "emoji.json") if entry["code"] not in there]
    others = [Thing(entry["code"], _name(entry), entry["group"], entry["images"]) for entry in entries]
    _check_pictures(folder, others)
    return others


def _check_pictures(folder: Path, things: list[Thing]) -> None:
    for thing in things:
        for vendor in (*VENDORS, UNSEEN_VENDOR):
            if not (folder / thing.images.get(vendor, "missing")).is_file():
                raise UserError(f"{folder}: no picture of {thing.name!r} ({thing.code}) by {vendor}; fetch them again")


def with_article(word: str) -> str:
    """An "owl" is "an owl", but "bread" and "grapes" as they are: plurals and what is not counted have none."""
    if word in _NOT_COUNTED or (word.endswith("s") and not word.endswith(("ss", "us", "ros"))):
        return word
    return f"{'an' if word[0] in 'aeiou' and not word.startswith(('uni', 'ew', 'one')) else 'a'} {word}"


_NOT_COUNTED = {"bread", "broccoli", "clothing", "food"}


def read_things(folder: Path) -> list[Thing]:
    """The things in the order of the table. `UserError` for a folder that is none, or lacks a vendor's picture."""
    file = folder / "emoji.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; fetch the pictures first: llava-compete fetch emoji --out {folder}")
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    named = [(_name(entry), entry) for entry in read_json(file)]
    things = [Thing(e["code"], name, kinds[name], e["images"]) for name, e in named if name in kinds]
    if lost := set(kinds) - {thing.name for thing in things}:
        raise UserError(f"{file}: has no {', '.join(sorted(lost))}; fetch the pictures again")
    _check_pictures(folder, things)
    return things


def _name(entry: dict[str, Any]) -> str:
    """In lower case; a cat's face is a cat."""
    return str(entry["name"]).lower().removesuffix(" face")


def held_out(things: list[Thing], one_in: int = 3) -> set[str]:
    """Names that training never sees: every `one_in`-th of a kind, in the order of a hash of the name."""
    found: set[str] = set()
    for kind in sorted({thing.kind for thing in things}):
        names = sorted({thing.name for thing in things if thing.kind == kind}, key=_hash)
        found |= set(names[::one_in])
    return found


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def main_colour(path: Path) -> str | None:
    """The colour that most of a picture's visible pixels have; None where no colour has two fifths of them."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGBA").resize((24, 24), Image.Resampling.BOX)).reshape(-1, 4)
    names = [_colour_name(*(int(value) for value in pixel[:3])) for pixel in pixels if pixel[3] > 200]
    best = max(COLOURS, key=names.count)
    return best if names and names.count(best) >= 0.4 * len(names) else None


def _colour_name(red: int, green: int, blue: int) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.22:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.87 else "grey" if value > 0.3 else "black"
    degrees = hue * 360
    if value < 0.72 and (degrees < 45 or degrees > 345) and saturation > 0.2:
        return "brown"
    if degrees < 14 or degrees >= 346:
        return "pink" if saturation < 0.5 else "red"
    limits = ((42, "orange"), (68, "yellow"), (170, "green"), (255, "blue"), (292, "purple"), (346, "pink"))
    return next(name for limit, name in limits if degrees < limit)
