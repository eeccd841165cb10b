"""Questions about pictures of things, by type. Everything is drawn from the random generator that is given.

What asks for a comparison is answered after the kind of what is shown ("animal and vehicle: no"): a small language
model that speaks first compares words, which it can, in place of features. Names would tell two dogs from a dog and a
cat, but of things never seen they agree by luck. Only what stands behind the colon is the answer.

    name      What is this?                                 -> tiger
    kind      What kind of thing is it?                     -> animal
    yes_no    Is this a tiger? Is this an animal?           -> animal: yes
    describe  Describe the picture in a sentence.           -> A tiger, which is an animal.
    colour    What colour is it mostly?                     -> orange
    same      Do both pictures show the same thing?         -> animal and vehicle: no
    odd       Which of the four is not like the others?     -> animal, animal, tool, animal: third
    style     Which style is it: flat, shaded or 3D?        -> 3D
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llava_compete.demo.emoji.table import KINDS, Thing, main_colour, with_article

PLACES = ("first", "second", "third", "fourth")
STYLES = {"twitter": "flat", "google": "shaded", "fluent": "3D"}
WORDING = {
    "name": "What is this?",
    "kind": "What kind of thing is it?",
    "describe": "Describe the picture in a sentence.",
    "colour": "What colour is it mostly?",
    "same": "Do both pictures show the same thing?",
    "odd": "Which of the four is not like the others?",
    "style": "Which style is it: flat, shaded or 3D?",
}


@dataclass(frozen=True)
class Question:
    """images: paths below the pictures' folder. said: what a model is to say. answer: what of it is scored."""

    type: str
    images: tuple[str, ...]
    text: str
    said: str
    answer: str


@dataclass(frozen=True)
class Asker:
    """Asks about `things` as `vendors` draw them. `others`: vendors of the second picture of `same`."""

    folder: Path
    things: Sequence[Thing]
    vendors: Sequence[str]
    others: Sequence[str]
    rng: random.Random
    _colours: dict[str, str | None] = field(default_factory=dict)

    def ask(self, kind: str) -> Question:
        """A question of a type, about a thing that is drawn."""
        return ASKERS[kind](self, self.draw())

    def draw(self, kind: str | None = None, but: Thing | None = None) -> Thing:
        """A thing, of a kind if one is given and not of the name of `but`."""
        fitting = [t for t in self.things if kind in (None, t.kind) and (but is None or t.name != but.name)]
        return self.rng.choice(fitting)

    @cached_property
    def coloured(self) -> dict[str, list[str]]:
        """The pictures that have a main colour, by colour."""
        found: dict[str, list[str]] = {}
        for image in (thing.images[vendor] for thing in self.things for vendor in self.vendors):
            if colour := self.colour(image):
                found.setdefault(colour, []).append(image)
        return found

    def picture(self, thing: Thing) -> str:
        """The thing as one of the vendors draws it."""
        return thing.images[self.rng.choice(self.vendors)]

    def colour(self, image: str) -> str | None:
        """`main_colour`, worked out once a picture."""
        if image not in self._colours:
            self._colours[image] = main_colour(self.folder / image)
        return self._colours[image]


def _name(asker: Asker, thing: Thing) -> Question:
    return _about_one("name", asker.picture(thing), thing.name)


def _kind(asker: Asker, thing: Thing) -> Question:
    kind = asker.rng.choice(sorted({other.kind for other in asker.things}))  # rare kinds as often as animals
    return _about_one("kind", asker.picture(asker.draw(kind)), kind)


def _yes_no(asker: Asker, thing: Thing) -> Question:
    is_so = asker.rng.random() < 0.5
    if asker.rng.random() < 0.5:
        said_of = thing if is_so else asker.draw(but=thing)
        text = f"Are these {said_of.name}?" if said_of.is_plural else f"Is this {said_of.article}?"
    else:
        kind = thing.kind if is_so else asker.rng.choice([kind for kind in KINDS if kind != thing.kind])
        text = f"Is this {with_article(kind)}?"
    answer = "yes" if is_so else "no"
    return Question("yes_no", (asker.picture(thing),), text, f"{thing.kind}: {answer}", answer)


def _describe(asker: Asker, thing: Thing) -> Question:
    return Question("describe", (asker.picture(thing),), WORDING["describe"], description(thing), thing.name)


def description(thing: Thing) -> str:
    """One sentence: what it is, and of which kind."""
    article, verb = thing.article, "are" if thing.is_plural else "is"
    return f"{article[0].upper()}{article[1:]}, which {verb} {with_article(thing.kind)}."


def _colour(asker: Asker, thing: Thing) -> Question:
    colour = asker.rng.choice(sorted(asker.coloured))  # purple as often as yellow, which faces and hands have
    return _about_one("colour", asker.rng.choice(asker.coloured[colour]), colour)


def _same(asker: Asker, thing: Thing) -> Question:
    is_so = asker.rng.random() < 0.5
    other = thing if is_so else asker.draw(but=thing)
    image = asker.picture(thing)
    drawn = [other.images[vendor] for vendor in asker.others if other.images[vendor] != image]
    answer = "yes" if is_so else "no"
    said = f"{thing.kind} and {other.kind}: {answer}"
    return Question("same", (image, asker.rng.choice(drawn)), WORDING["same"], said, answer)


def _odd(asker: Asker, thing: Thing) -> Question:
    kinds = [k for k in KINDS if len({t.name for t in asker.things if t.kind == k}) >= 3]
    common = asker.rng.choice(kinds)
    usual = asker.rng.sample(sorted({t.name: t for t in asker.things if t.kind == common}.items()), 3)
    odd = asker.draw(asker.rng.choice([k for k in sorted({t.kind for t in asker.things}) if k != common]))
    place = asker.rng.randrange(4)
    shown = [thing for _, thing in usual]
    shown.insert(place, odd)
    said = f"{', '.join(thing.kind for thing in shown)}: {PLACES[place]}"
    return Question("odd", tuple(asker.picture(thing) for thing in shown), WORDING["odd"], said, PLACES[place])


def _style(asker: Asker, thing: Thing) -> Question:
    vendor = asker.rng.choice([vendor for vendor in asker.vendors if vendor in STYLES])
    return _about_one("style", thing.images[vendor], STYLES[vendor])


def _about_one(kind: str, image: str, answer: str) -> Question:
    return Question(kind, (image,), WORDING[kind], answer, answer)


ASKERS: dict[str, Callable[[Asker, Thing], Question]] = {
    "name": _name,
    "kind": _kind,
    "yes_no": _yes_no,
    "describe": _describe,
    "colour": _colour,
    "same": _same,
    "odd": _odd,
    "style": _style,
}
