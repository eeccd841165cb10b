"""The one exception for mistakes a user can mend, and the phrases that its messages share.

`llava-compete` prints the message as a single clear line and exits with status 2. The message names the file,
key or record, what was found and what was expected. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input: a config, a data record, a checkpoint directory or an environment that cannot be used."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint "; did you mean 'nearest'?", or nothing where no known name is near."""
    near = nearest(name, known, 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to `count` known names that look like `name`, the nearest first."""
    return difflib.get_close_matches(name, sorted(known), n=count, cutoff=cutoff)


def and_more(items: Sequence[str], limit: int = 3) -> str:
    """The first items, comma separated, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
