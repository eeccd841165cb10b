"""Keep a library from importing an optional package merely because it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_installed(package: str) -> Iterator[None]:
    """Make `package` look as if it were not installed, unless it has been imported already.

    None in `sys.modules` is Python's own way to say so: `import` raises ModuleNotFoundError and
    `importlib.util.find_spec` returns None.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]
