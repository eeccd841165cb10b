"""The words of a page and where they stand: `page_words` of a row with one picture.

    "page_words": [{"text": "Total", "box": [x0, y0, x1, y1]}, ...]

in pixels of the picture as it is shown, turned upright; x0 < x1, y0 < y1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llava_compete.data.row_errors import RecordError, shown
from llava_compete.vision.image_decoder import Size
from llava_compete.vision.tiles import Box

KEY = "page_words"
_KIND = "page_words_invalid"


class Word(NamedTuple):
    """A text, and its left, top, right and bottom edges in the picture's pixels."""

    text: str
    box: Box


def row_words(row: Mapping[str, Any], num_images: int) -> list[Word]:
    """The words of a row; none where it has no such key.

    Raises:
        RecordError: another form, or not exactly one image that they could stand on.
    """
    found = row.get(KEY)
    if found is None or (isinstance(found, Sequence) and len(found) == 0):
        return []
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise RecordError(_KIND, f"{KEY}: found {shown(found)}, expected a list of {{text, box}}")
    if num_images != 1:
        raise RecordError(_KIND, f"{KEY}: found in a row with {num_images} images, expected one image")
    return [_word(number, item) for number, item in enumerate(found)]


def check_inside(words: Sequence[Word], picture: Size) -> None:
    """Raise a `RecordError` for the first word that does not stand within a picture of this height and width."""
    height, width = picture
    for number, word in enumerate(words):
        left, top, right, bottom = word.box
        if min(left, top) < 0 or right > width or bottom > height:
            raise RecordError(
                _KIND,
                f"{KEY}[{number}] {shown(word.text)}: box {list(word.box)} reaches outside the picture of "
                f"{width}x{height} pixels",
            )


def to_json(words: Sequence[Word]) -> str | None:
    """For a table; None without words."""
    return json.dumps(words, ensure_ascii=False) if words else None


def from_json(text: str | None) -> list[Word]:
    """What `to_json` wrote."""
    return [Word(word, tuple(box)) for word, box in json.loads(text or "[]")]


def _word(number: int, item: Any) -> Word:
    place = f"{KEY}[{number}]"
    text = item.get("text") if isinstance(item, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise RecordError(_KIND, f"{place}: found {shown(item)}, expected a text and a box")
    box = item.get("box")
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        raise RecordError(_KIND, f"{place}: found box {shown(box)}, expected [left, top, right, bottom] in pixels")
    left, top, right, bottom = map(float, box)
    if left >= right or top >= bottom:
        raise RecordError(_KIND, f"{place}: found box {shown(list(box))}, expected left < right and top < bottom")
    return Word(text, (left, top, right, bottom))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
