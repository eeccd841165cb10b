"""Four kinds of page, each with what can be asked about it: a receipt, a table, a bar chart, a letter.

    receipt   total, date, price      What is the total?                  -> 23.45
    table     cell                    What is the value of Lyon in March? -> 482
    chart     largest, smallest       Which bar is the largest?           -> Rice
    letter    total, date, sender     Which amount is due?                -> 310.00

Everything is drawn from the random generator that is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image

from llava_compete.demo.documents.paper import Paper, Question


def _words(text: str) -> list[str]:
    return text.split()


ITEMS = _words("""
    Apples Bread Butter Carrots Cheese Coffee Cream Eggs Flour Grapes Honey Juice Lemons Milk Noodles Onions Oranges
    Pepper Rice Salt Soap Sugar Tea Tomatoes""")
CITIES = _words("""
    Athens Berlin Boston Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London Lyon Madrid Milan Naples Osaka
    Oslo Paris Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna Warsaw""")
MONTHS = _words("""
    January February March April May June July August September October November December""")
NAMES = _words("Adams Baker Clark Davis Evans Foster Green Harris Irwin Jones King Lewis Moore Nolan Owens Parker")
SHOPS = ("Corner Market", "Green Basket", "Daily Goods", "Harbour Store", "Mill Street Foods", "Sunrise Shop")
MEASURES = ("Sales", "Visitors", "Orders", "Members", "Tickets", "Deliveries")
REASONS = (
    "for the repair of the roof", "for the use of the hall", "for the delivery of paper", "for the lease of the shop",
    "for the work on the garden", "for the printing of cards",
)  # fmt: skip
SENTENCES = (
    "We thank you for the order that you placed with us.",
    "Please find below what was agreed when we last met.",
    "The work was done as planned, and nothing is left open.",
    "If anything is not clear, do not hesitate to call us.",
    "All goods remain ours until they are paid in full.",
    "Our office is open on every day but Sunday.",
    "You will find the list of all parts on the next page.",
    "We look forward to working with you again.",
)


class Page:
    """A page, its texts in the order of writing, its words with their boxes, and every question about it."""

    def __init__(self, paper: Paper, questions: list[Question]) -> None:
        self.image: Image.Image = paper.image
        self.lines = paper.lines
        self.words = paper.words
        self.questions = questions


def receipt(rng: random.Random) -> Page:
    """A narrow page of things and prices."""
    paper = Paper(rng, rng.randint(600, 720), rng.randint(700, 1200))
    left, right = rng.randint(40, 120), paper.image.width - rng.randint(40, 120)
    y, date = rng.randint(30, 80), _date(rng)
    paper.write(left, y, rng.choice(SHOPS), bold=True)
    paper.write(left, y + paper.step, f"{rng.randint(1, 99)} {rng.choice(CITIES)} Road")
    for text in rng.sample(
        (f"Date: {date}", f"Receipt {rng.randint(1000, 9999)}", f"Served by {rng.choice(NAMES)}"), 3
    ):
        y += paper.step
        paper.write(left, y + paper.step, text)
    y += 4 * paper.step
    cents = {item: rng.randint(30, 1999) for item in rng.sample(ITEMS, rng.randint(4, 12))}
    for item, price in cents.items():
        paper.write(left, y, item)
        paper.write(right, y, _money(price), right=True)
        y += round(rng.uniform(1, 1.6) * paper.step)
    paper.rule(left, right, y)
    subtotal = sum(cents.values())
    tax = round(subtotal * rng.choice((5, 8, 10, 20)) / 100)
    for name, amount in (("Subtotal", subtotal), ("Tax", tax), ("Total", subtotal + tax)):
        y += paper.step
        paper.write(left, y, name, bold=name == "Total")
        paper.write(right, y, _money(amount), bold=name == "Total", right=True)
    paper.write(left, y + 3 * paper.step, rng.choice(("Paid in cash", "Paid by card", "Thank you!")))
    item = rng.choice(list(cents))
    return Page(
        paper,
        [
            Question("total", "What is the total?", _money(subtotal + tax)),
            Question("date", "What is the date?", date),
            Question("price", f"What is the price of {item}?", _money(cents[item])),
        ],
    )


def table(rng: random.Random) -> Page:
    """Numbers by city and month."""
    paper = Paper(rng, rng.randint(800, 1200), rng.randint(600, 900))
    cities, months = (
        rng.sample(CITIES, rng.randint(5, 14)),
        sorted(rng.sample(MONTHS, rng.randint(3, 6)), key=MONTHS.index),
    )
    left, top = rng.randint(40, 120), rng.randint(40, 120)
    paper.write(left, top, f"{rng.choice(MEASURES)} by city, {rng.randint(1990, 2029)}", bold=True)
    first = left + paper.width("Warsaw") + rng.randint(60, 120)
    across = min(rng.randint(90, 150), (paper.image.width - first - 20) // len(months))
    down = round(rng.uniform(1, 2) * paper.step)
    y = top + 2 * paper.step
    for number, month in enumerate(months):
        paper.write(first + (number + 1) * across - 20, y, month, bold=True, right=True)
    paper.rule(left, first + len(months) * across, y + paper.step)
    values = {city: [rng.randint(10, 999) for _ in months] for city in cities}
    for city in cities:
        y += down
        paper.write(left, y, city)
        for number, value in enumerate(values[city]):
            paper.write(first + (number + 1) * across - 20, y, str(value), right=True)
    questions = []
    for city in rng.sample(cities, 3):
        column = rng.randrange(len(months))
        text = f"What is the value of {city} in {months[column]}?"
        questions.append(Question("cell", text, str(values[city][column])))
    return Page(paper, questions)


def chart(rng: random.Random) -> Page:
    """Bars of different heights with their names below; the largest leads the next by a tenth or more."""
    paper = Paper(rng, rng.randint(700, 1200), rng.randint(600, 800))
    names = rng.sample(ITEMS, rng.randint(4, 9))
    heights = [rng.uniform(0.2, 0.85) for _ in names]
    largest, smallest = rng.sample(range(len(names)), 2)
    heights[largest], heights[smallest] = rng.uniform(0.95, 1), rng.uniform(0.05, 0.12)
    left, top = rng.randint(60, 120), rng.randint(60, 120)
    base = paper.image.height - rng.randint(80, 140)
    paper.write(left, top - 2 * paper.step, f"{rng.choice(MEASURES)} in {rng.randint(1990, 2029)}", bold=True)
    for tick in range(0, 101, 20):
        y = base - (base - top) * tick / 100
        paper.write(left - 6, y - paper.size / 2, str(tick), right=True)
        paper.rule(left - 3, left, y)
    paper.draw.line((left, top, left, base), paper.ink)
    paper.rule(left, paper.image.width - 40, base)
    slot = (paper.image.width - 40 - left) / len(names)
    colour = rng.choice(((60, 100, 170), (190, 90, 60), (90, 150, 90), (120, 120, 120)))
    for number, (name, height) in enumerate(zip(names, heights, strict=True)):
        x = left + (number + 0.5) * slot
        paper.draw.rectangle((x - slot / 3, base - (base - top) * height, x + slot / 3, base), colour)
        paper.write(x - paper.width(name) / 2, base + paper.size / 2, name)
    return Page(
        paper,
        [
            Question("largest", "Which bar is the largest?", names[largest]),
            Question("smallest", "Which bar is the smallest?", names[smallest]),
        ],
    )


def letter(rng: random.Random) -> Page:
    """A letter that asks for money."""
    paper = Paper(rng, rng.randint(700, 900), rng.randint(1000, 1200), rng.choice(("sans", "serif")))
    left, y = rng.randint(60, 110), rng.randint(50, 100)
    sender, reader = rng.sample(NAMES, 2)
    date, amount = _date(rng), _money(rng.randint(1000, 99999))
    paper.write(left, y, f"{sender} & Sons", bold=True)
    paper.write(left, y + paper.step, f"{rng.randint(1, 99)} {rng.choice(CITIES)} Road")
    paper.write(paper.image.width - left, y, date, right=True)
    y += 4 * paper.step
    paper.write(left, y, f"To: {rng.choice(('Mr', 'Ms'))} {reader}")
    paper.write(left, y + 2 * paper.step, f"Dear {reader},")
    y += 4 * paper.step
    body = rng.sample(SENTENCES, rng.randint(3, len(SENTENCES)))
    body.insert(rng.randint(1, len(body)), f"The amount of {amount} is due {rng.choice(REASONS)}.")
    for sentence in body:
        paper.write(left, y, sentence)
        y += round(rng.choice((1, 1, 2)) * paper.step)
    paper.write(left, y + 2 * paper.step, "Yours sincerely,")
    paper.write(left, y + 4 * paper.step, sender)
    return Page(
        paper,
        [
            Question("total", "Which amount is due?", amount),
            Question("date", "What is the date of the letter?", date),
            Question("sender", "Who wrote the letter?", sender),
        ],
    )


LAYOUTS: dict[str, Callable[[random.Random], Page]] = {
    "receipt": receipt,
    "table": table,
    "chart": chart,
    "letter": letter,
}


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2029)}"


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"
