"""JSON that others wrote: what Python takes in silence, or refuses in a way of its own, is an error by name."""

from __future__ import annotations

import json
from typing import Any

from llava_compete.data.row_errors import RecordError

# Numbers of more than 4,300 digits are a ValueError, a thousand nested lists a RecursionError.
UNDECODABLE = (ValueError, RecursionError)


class KeyTwiceError(ValueError):
    """A mapping has a key twice, and Python's reader would keep the last value without a word."""


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of all that we read from others.

    Raises:
        KeyTwiceError: naming the key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise KeyTwiceError(f"the key {twice!r} stands twice in one mapping")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=distinct)


def undecodable(where: str, error: Exception, text: str) -> RecordError:
    """What stands in place of a row whose JSON cannot be read."""
    return RecordError("key_twice" if isinstance(error, KeyTwiceError) else "not_json", f"{where}: {error}", text)
