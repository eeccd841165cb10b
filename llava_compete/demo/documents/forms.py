"""A filled form of one size: date, table, bar chart and total, its words few and its fields in fixed places.

Meant for a small model and an hour of a CPU; `layouts` has the pages that a large one needs. 600 x 600 pixels, text
of 9 to 12. The table stands above the chart or below it. Answers are one of ten words, of twelve months, of nine sums,
behind the line that they are read off:

    total     What is the total?                        -> Total 40: 40
    date      What is the month?                        -> Month May: May
    largest   Which bar is the largest?                 -> Soup Rice Tea Beans: Rice
    cell      What is in row East, column Friday?       -> East Milk Fish Tea: Tea

All words of the page, in reading order, are its text: what a model learns to read before it is asked. A field lies
within one token of the grids that are compared, of 3 x 3 tokens a tile: 100 pixels wide and high in 2 x 2 tiles, 67 in
3 x 3.
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
LEFTS = (138, 204, 338, 404)  # where columns begin: within tokens of both grids. Only months are longer than one.
TOPS = tuple(12 + round(row * SIDE / 9) for row in range(9))  # where rows begin
_SHIFT = 3  # pixels by which a field stands off its place, either way
_WIDE = 56  # a bar


def form(rng: random.Random) -> Page:
    """One form."""
    paper = Paper(rng, SIDE, SIDE, "sans")
    paper.size = rng.randint(*TEXT_SIZES)
    table_row, chart_row = (1, 6) if rng.random() < 0.5 else (4, 1)
    month, total = rng.choice(MONTHS), rng.choice(TOTALS)
    _field(paper, rng, 0, "Total", total)
    _field(paper, rng, 2, "Month", month)
    cells = [[rng.choice(WORDS) for _ in COLUMNS] for _ in ROWS]
    bars = rng.sample(WORDS, NUM_BARS)
    largest = rng.randrange(NUM_BARS)
    blocks = [
        (table_row, _table(paper, rng, table_row, cells)),
        (chart_row, _chart(paper, rng, chart_row, bars, largest)),
    ]
    paper.lines = [f"Total {total} Month {month}", *(line for _, lines in sorted(blocks) for line in lines)]
    questions = [
        Question("total", "What is the total?", total, f"Total {total}"),
        Question("date", "What is the month?", month, f"Month {month}"),
        Question("largest", "Which bar is the largest?", bars[largest], " ".join(bars)),
    ]
    for place in rng.sample(range(len(ROWS) * len(COLUMNS)), NUM_CELLS):
        row, column = divmod(place, len(COLUMNS))
        text = f"What is in row {ROWS[row]}, column {COLUMNS[column]}?"
        questions.append(Question("cell", text, cells[row][column], f"{ROWS[row]} {' '.join(cells[row])}"))
    return Page(paper, questions)


def _field(paper: Paper, rng: random.Random, column: int, name: str, value: str) -> None:
    """In the first row a name, and its value one column to the right."""
    _write(paper, rng, column, 0, name, bold=True)
    _write(paper, rng, column + 1, 0, value)


def _write(paper: Paper, rng: random.Random, column: int, row: int, text: str, bold: bool = False) -> None:
    shift_x, shift_y = rng.randint(-_SHIFT, _SHIFT), rng.randint(-_SHIFT, _SHIFT)
    paper.write(LEFTS[column] + shift_x, TOPS[row] + shift_y, text, bold=bold)


def _table(paper: Paper, rng: random.Random, first: int, cells: list[list[str]]) -> list[str]:
    """Names of columns, and rows of cells behind their names."""
    for number, name in enumerate(COLUMNS):
        _write(paper, rng, number + 1, first, name, bold=True)
    paper.rule(LEFTS[0], LEFTS[-1] + _WIDE, TOPS[first] + 30)
    for row, (name, words) in enumerate(zip(ROWS, cells, strict=True), start=first + 1):
        _write(paper, rng, 0, row, name, bold=True)
        for column, word in enumerate(words):
            _write(paper, rng, column + 1, row, word)
    return [" ".join(COLUMNS), *(f"{name} {' '.join(words)}" for name, words in zip(ROWS, cells, strict=True))]


def _chart(paper: Paper, rng: random.Random, first: int, names: list[str], largest: int) -> list[str]:
    """Bars of two rows with their names below; the largest leads by a quarter of the height. Its text is the names."""
    base = TOPS[first + 2] - 8
    height = base - TOPS[first]
    colour = rng.choice(((60, 100, 170), (190, 90, 60), (90, 150, 90), (120, 120, 120)))
    for number, name in enumerate(names):
        share = rng.uniform(0.95, 1) if number == largest else rng.uniform(0.2, 0.7)
        x = LEFTS[number]
        paper.draw.rectangle((x, base - share * height, x + _WIDE, base), colour)
        _write(paper, rng, number, first + 2, name)
    paper.rule(LEFTS[0], LEFTS[-1] + _WIDE, base)
    return [" ".join(names)]
