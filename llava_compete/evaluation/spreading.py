"""A few of many, evenly spread."""

from __future__ import annotations


def spread(total: int, count: int) -> list[int]:
    """At most `count` different numbers below `total`, from the first to the last."""
    count = min(count, total)
    return [round(place * (total - 1) / max(count - 1, 1)) for place in range(count)]
