"""The recipes (configs/) and evaluation files (eval/) that belong to the package, wherever it is installed.

In a checkout they lie beside the package; a wheel carries a copy of them in this folder (setup.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_HERE = Path(__file__).resolve().parent


def folder(name: Literal["configs", "eval"]) -> Path:
    """The folder `name` of the checkout, or the wheel's copy of it."""
    return _HERE / name if is_copy() else _HERE.parents[1] / name


def is_copy() -> bool:
    """Whether these are an installed wheel's, with no checkout around them."""
    return (_HERE / "configs").is_dir()
