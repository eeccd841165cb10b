"""Rendered scenes: one to three coloured shapes, and truthful questions about them.

Objects never share a row or a column of a 3×3
grid, so that "left of" and "above" are never a matter of taste. Everything is drawn from a `random.Random`, hence the
same on every machine.

A question is asked only where its answer is unique, and answers are balanced inside each type: knowing the type of
a question, without the image, gives no more than one over the number of its answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw

IMAGE_SIZE = 48  # pixels; cells of 16
GRID = 3
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 30),
}
SHAPES = ("circle", "square", "triangle")
MAX_OBJECTS = 3
_SUPERSAMPLE = 4


class Thing(NamedTuple):
    """One object: its centre and half size are in pixels, x to the right, y downwards."""

    color: str
    shape: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    """Objects from left to right, on a grey background of brightness `background`."""

    things: tuple[Thing, ...]
    background: int


class Question(NamedTuple):
    """A question with its one-word answer; `kind` is a key of `QUESTION_KINDS`."""

    kind: str
    text: str
    answer: str


def sample_scene(rng: random.Random, num_objects: int | None = None) -> Scene:
    """Draw a scene with `num_objects` (default 1 to 3) objects, no two of the same colour and shape."""
    count = num_objects or rng.randint(1, MAX_OBJECTS)
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
    columns, rows = rng.sample(range(GRID), count), rng.sample(range(GRID), count)
    cell = IMAGE_SIZE // GRID
    things = [
        Thing(
            color,
            shape,
            x=column * cell + cell // 2 + rng.randint(-1, 1),
            y=row * cell + cell // 2 + rng.randint(-1, 1),
            radius=rng.randint(5, 7),
        )
        for (color, shape), column, row in zip(names, columns, rows, strict=True)
    ]
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), background=rng.randint(225, 250))


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image of `IMAGE_SIZE`, with smooth edges."""
    size = IMAGE_SIZE * _SUPERSAMPLE
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, r = (value * _SUPERSAMPLE for value in (thing.x, thing.y, thing.radius))
        fill = COLORS[thing.color]
        if thing.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif thing.shape == "square":
            draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        else:
            draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def caption(scene: Scene) -> str:
    """The objects from left to right: every word of it can only be learnt from the image."""
    return ", ".join(thing.name for thing in scene.things)


def _ask_color(rng: random.Random, scene: Scene) -> Question | None:
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("color", f"What color is the {thing.shape}?", thing.color)


def _ask_shape(rng: random.Random, scene: Scene) -> Question | None:
    colors = [thing.color for thing in scene.things]
    unique = [thing for thing in scene.things if colors.count(thing.color) == 1]
    if not unique:
        return None
    thing = rng.choice(unique)
    return Question("shape", f"What shape is the {thing.color} object?", thing.shape)


def _ask_count(rng: random.Random, scene: Scene) -> Question:
    return Question("count", "How many objects are there?", str(len(scene.things)))


def _ask_existence(rng: random.Random, scene: Scene) -> Question:
    present = {thing.name for thing in scene.things}
    absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in present]
    there = rng.random() < 0.5
    name = rng.choice(sorted(present) if there else absent)
    return Question("existence", f"Is there a {name}?", "yes" if there else "no")


def _ask_relation(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.things) < 2:
        return None
    first, second = rng.sample(scene.things, 2)
    if rng.random() < 0.5:
        answer = "left" if first.x < second.x else "right"
        return Question("relation", f"Is the {first.name} left or right of the {second.name}?", answer)
    answer = "above" if first.y < second.y else "below"
    return Question("relation", f"Is the {first.name} above or below the {second.name}?", answer)


class QuestionKind(NamedTuple):
    """How to ask, and all answers that can be right."""

    ask: Callable[[random.Random, Scene], Question | None]
    answers: tuple[str, ...]


QUESTION_KINDS: dict[str, QuestionKind] = {
    "color": QuestionKind(_ask_color, tuple(COLORS)),
    "shape": QuestionKind(_ask_shape, SHAPES),
    "count": QuestionKind(_ask_count, tuple(str(n + 1) for n in range(MAX_OBJECTS))),
    "existence": QuestionKind(_ask_existence, ("yes", "no")),
    "relation": QuestionKind(_ask_relation, ("left", "right", "above", "below")),
}


def sample_conversation(rng: random.Random, scene: Scene, max_turns: int) -> list[Question]:
    """Up to `max_turns` different questions about one scene, at least one of them, kinds in random order."""
    kinds = list(QUESTION_KINDS) * 2
    rng.shuffle(kinds)
    questions: dict[str, Question] = {}
    for kind in kinds:
        if len(questions) == max_turns:
            break
        question = QUESTION_KINDS[kind].ask(rng, scene)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def sample_balanced(rng: random.Random, count: int, accept: Callable[[Scene], bool]) -> list[tuple[Scene, Question]]:
    """`count` accepted scenes with one question each; equal numbers (±1) of each kind and of each answer in a kind."""
    kinds = list(QUESTION_KINDS)
    asked: dict[str, int] = dict.fromkeys(kinds, 0)
    picked = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        ask, answers = QUESTION_KINDS[kind]
        wanted = answers[asked[kind] % len(answers)]
        asked[kind] += 1
        while True:
            scene = sample_scene(rng)
            question = ask(rng, scene)
            if question is not None and question.answer == wanted and accept(scene):
                break
        picked.append((scene, question))
    return picked
