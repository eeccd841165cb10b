"""Rooms import downwards only, also inside functions, and docs/architecture.md names every room."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_compete"
# From the bottom up; rooms of one line may not import each other in a circle, which Python itself would refuse.
ORDER = [
    ["errors", "parts", "optional_packages", "processes", "shipped"],
    ["files", "config", "console"],
    ["manifest", "weight_files"],
    ["moe"],
    ["vision", "language"],
    ["model"],
    ["data", "demo", "fetch", "convert"],
    ["check"],
    ["train"],
    ["evaluation"],
    ["plan", "report"],
    ["bench", "study", "talk"],
    ["commands", "cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def _rooms() -> list[str]:
    return sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())


def _imports(file: Path) -> Iterator[str]:
    """Rooms that a module imports from, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("llava_compete."))


def test_every_room_has_its_place() -> None:
    assert set(_rooms()) - {"__init__"} == set(LEVEL)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [path.name for path in PACKAGE.iterdir() if path.is_dir() and f"{path.name}/" not in text]
    assert [name for name in missing if name in LEVEL and name != "shipped"] == []


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_no_arrow_points_upward(room: str) -> None:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").is_file() else sorted((PACKAGE / room).rglob("*.py"))
    upward = {
        f"{file.relative_to(ROOT)} -> {other}"
        for file in files
        for other in _imports(file)
        if LEVEL[other] > LEVEL[room]
    }
    assert not upward


def test_no_two_test_files_have_one_name() -> None:
    """They are imported by it, without packages: the second would not be collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
