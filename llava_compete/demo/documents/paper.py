"""A page to write on: real fonts (DejaVu, which matplotlib carries) at 8 to 12 pixels, on paper of some shade."""

from __future__ import annotations

import hashlib
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from llava_compete.optional_packages import require

FAMILIES = {
    "sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    "mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
}
TEXT_SIZES = (8, 12)  # pixels of the em, smallest and largest


class Question(NamedTuple):
    """One question about a page. read: a line of it that a model is to say before the answer, none where empty."""

    kind: str
    text: str
    answer: str
    read: str = ""

    @property
    def said(self) -> str:
        """What a model is to say; only what stands behind the colon is scored."""
        return f"{self.read}: {self.answer}" if self.read else self.answer


class Paper:
    """A page being written. `size` is that of its text in pixels; `lines` are all texts in the order of writing.

    words: each word of them, and the left, top, right and bottom edges of its ink.
    """

    def __init__(self, rng: random.Random, width: int, height: int, family: str | None = None) -> None:
        shade = rng.randint(236, 255)
        self.image = Image.new("RGB", (width, height), (shade, shade - rng.randint(0, 6), shade - rng.randint(0, 14)))
        self.draw = ImageDraw.Draw(self.image)
        self.ink = (rng.randint(0, 50),) * 3
        self.family = family or rng.choice(sorted(FAMILIES))
        self.size = rng.randint(*TEXT_SIZES)
        self.lines: list[str] = []
        self.words: list[tuple[str, tuple[float, ...]]] = []

    @property
    def step(self) -> int:
        """From one line to the next."""
        return round(1.5 * self.size)

    def width(self, text: str, bold: bool = False) -> int:
        """Pixels that a text is long."""
        return round(font(self.family, bold, self.size).getlength(text))

    def write(self, x: float, y: float, text: str, bold: bool = False, right: bool = False) -> None:
        """A text from (x, y), its top left corner or, at `right`, its top right one."""
        left = x - self.width(text, bold) if right else x
        face = font(self.family, bold, self.size)
        self.draw.text((left, y), text, self.ink, face)
        self.lines.append(text)
        for found in re.finditer(r"\S+", text):
            start = left + face.getlength(text[: found.start()])
            self.words.append((found[0], self.draw.textbbox((start, y), found[0], face)))

    def rule(self, left: float, right: float, y: float) -> None:
        """A thin line across."""
        self.draw.line((left, y, right, y), self.ink)


@lru_cache(maxsize=64)
def font(family: str, bold: bool, size: int) -> ImageFont.FreeTypeFont:
    """One of DejaVu's fonts; layout by Pillow itself, the same with and without libraqm."""
    path = fonts_folder() / FAMILIES[family][bold]
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def fonts_folder() -> Path:
    """Where matplotlib keeps its fonts.

    Raises:
        UserError: it is not installed.
    """
    require("matplotlib", extra="train", purpose="writing documents (in the fonts that it carries)")
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf"


def fonts_digest() -> str:
    """SHA-256 of the fonts that pages are written in."""
    files = sorted(name for pair in FAMILIES.values() for name in pair)
    return hashlib.sha256(b"".join((fonts_folder() / name).read_bytes() for name in files)).hexdigest()
