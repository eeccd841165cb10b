"""Optional packages: asked for where one is needed, and kept from a library that would import one for being there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llava_compete.errors import UserError


def require(*packages: str, extra: str, purpose: str) -> None:
    """Raise a `UserError` that says what to install where one of `packages` is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install 'llava_compete[{extra}]'")


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
