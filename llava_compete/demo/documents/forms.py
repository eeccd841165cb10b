"""A filled form of one size: date, table, bar chart and total, its words few and its fields in fixed places.

Meant for a small model and an hour of a CPU; `layouts` has the pages that a large one needs. 600 x 600 pixels, text
of 9 to 12. The table stands above the chart or below it. Answers are one of ten words, of twelve months, of nine sums:

    total     What is the total?                        -> 40
    date      What is the month?                        -> May
    largest   Which bar is the largest?                 -> Rice
    cell      What is in row East, column Friday?       -> Tea

All words of the page, in reading order, are its text: what a projector learns to read before it is asked.
"""

from __future__ import annotations

import random

from llava_compete.demo.documents.layouts import MONTHS, Page
from llava_compete.demo.documents.paper import Paper, Question

SIDE = 600
TEXT_SIZES = (9, 12)
WORDS = ("Tea", "Rice", "Milk", "Salt", "Fish", "Soup", "Beans", "Sugar", "Honey", "Cheese")
TOTALS = tuple(str(tens) for tens in range(10, 100, 10))
ROWS, COLUMNS = ("North", "East", "South", "West"), ("Monday", "Tuesday", "Friday")
NUM_BARS, NUM_CELLS = 4, 5  # cells of a page that are asked for
# Where columns begin, so that no field lies across the borders of 2 x 2 tiles (300) or of 3 x 3 (200 and 400); and the
# pixels from a row to the next.
LEFTS, DOWN = (30, 121, 213, 420), 52
_SHIFT = 3  # pixels by which a field stands off its place, either way
_HALF = 270  # from the table's top to the chart's, or back


def form(rng: random.Random) -> Page:
    """One form."""
    paper = Paper(rng, SIDE, SIDE, "sans")
    paper.size = rng.randint(*TEXT_SIZES)
    table_top, chart_top = (50, 50 + _HALF) if rng.random() < 0.5 else (50 + _HALF, 50)
    month, total = rng.choice(MONTHS), rng.choice(TOTALS)
    _field(paper, rng, 0, 14, "Month", month)
    cells = [[rng.choice(WORDS) for _ in COLUMNS] for _ in ROWS]
    bars = rng.sample(WORDS, NUM_BARS)
    largest = rng.randrange(NUM_BARS)
    blocks = [
        (table_top, _table(paper, rng, table_top, cells)),
        (chart_top, _chart(paper, rng, chart_top, bars, largest)),
    ]
    _field(paper, rng, 2, 14, "Total", total)
    paper.lines = [f"{month} {total}", *(line for _, lines in sorted(blocks) for line in lines)]
    questions = [
        Question("total", "What is the total?", total),
        Question("date", "What is the month?", month),
        Question("largest", "Which bar is the largest?", bars[largest]),
    ]
    for place in rng.sample(range(len(ROWS) * len(COLUMNS)), NUM_CELLS):
        row, column = divmod(place, len(COLUMNS))
        text = f"What is in row {ROWS[row]}, column {COLUMNS[column]}?"
        questions.append(Question("cell", text, cells[row][column]))
    return Page(paper, questions)


def _field(paper: Paper, rng: random.Random, column: int, y: int, name: str, value: str) -> None:
    """A name, and its value one column to the right."""
    _write(paper, rng, column, y, name, bold=True)
    _write(paper, rng, column + 1, y, value)


def _write(paper: Paper, rng: random.Random, column: int, y: float, text: str, bold: bool = False) -> None:
    shift_x, shift_y = rng.randint(-_SHIFT, _SHIFT), rng.randint(-_SHIFT, _SHIFT)
    paper.write(LEFTS[column] + shift_x, y + shift_y, text, bold=bold)


def _table(paper: Paper, rng: random.Random, top: int, cells: list[list[str]]) -> list[str]:
    """Names of columns, and rows of cells; its text is the cells."""
    for number, name in enumerate(COLUMNS):
        _write(paper, rng, number + 1, top, name, bold=True)
    paper.rule(LEFTS[0], SIDE - LEFTS[0], top + DOWN // 2)
    for number, (name, words) in enumerate(zip(ROWS, cells, strict=True)):
        y = top + (number + 1) * DOWN
        _write(paper, rng, 0, y, name, bold=True)
        for column, word in enumerate(words):
            _write(paper, rng, column + 1, y, word)
    return [" ".join(words) for words in cells]


def _chart(paper: Paper, rng: random.Random, top: int, names: list[str], largest: int) -> list[str]:
    """Bars with their names below; the largest leads by a quarter of the height. Its text is the names."""
    base, height = top + 4 * DOWN - 10, 4 * DOWN - 30
    colour = rng.choice(((60, 100, 170), (190, 90, 60), (90, 150, 90), (120, 120, 120)))
    for number, name in enumerate(names):
        share = rng.uniform(0.95, 1) if number == largest else rng.uniform(0.2, 0.7)
        x = LEFTS[number]
        paper.draw.rectangle((x, base - share * height, x + 60, base), colour)
        _write(paper, rng, number, top + 4 * DOWN, name)
    paper.rule(LEFTS[0], SIDE - LEFTS[0], base)
    return [" ".join(names)]
