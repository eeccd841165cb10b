"""What prose names must exist: every path, module and command in backticks, in comments, docstrings and Markdown."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_compete.cli import COMMANDS, GROUPS

ROOT = Path(__file__).parents[1]
TOP = ("llava_compete", "scripts", "configs", "eval", "tests", "docs", "playground")
ROOMS = tuple(path.name for path in (ROOT / "llava_compete").iterdir() if path.is_dir())
# What a user's machine has later: made by a command, or named as an example.
MADE_LATER = re.compile(r"^(playground/data|eval/results/gpu|outputs)\b")
FILE = re.compile(r"[\w./-]+\.(py|sh|sbatch|yaml|json|md|jinja|toml)|[\w-]+(/[\w.-]+)+/?")


def _texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if Path(name).suffix in (".py", ".md", ".sh", ".yaml") and name != "CHANGELOG.md" and (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(encoding="utf-8")


def _quoted() -> list[tuple[str, str]]:
    return [(name, word) for name, text in _texts() for word in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)]


def _is_there(name: str, word: str) -> bool:
    path = word.rstrip("/").split("#")[0]
    bases = [ROOT, (ROOT / name).parent, ROOT / "llava_compete"]
    return any((base / path).exists() for base in bases)


def test_paths_exist() -> None:
    missing = []
    for name, quoted in _quoted():
        for word in quoted.split():
            known = word.startswith(tuple(f"{top}/" for top in TOP))
            known |= word.startswith(tuple(f"{room}/" for room in ROOMS)) and "." in word  # else a metric's name
            if known and FILE.fullmatch(word) and not MADE_LATER.match(word) and not _is_there(name, word):
                missing.append(f"{name}: {word}")
    assert not missing, "\n".join(missing)


def test_modules_exist() -> None:
    missing = []
    for name, quoted in _quoted():
        for word in re.findall(r"\bllava_compete(?:\.\w+)+", quoted):
            parts = word.split(".")
            # The last part may be a class or function of the module before it.
            for module in (word, ".".join(parts[:-1])):
                try:
                    if importlib.util.find_spec(module) is not None:
                        break
                except ModuleNotFoundError:
                    continue
            else:
                missing.append(f"{name}: {word}")
    assert not missing, "\n".join(missing)


def test_commands_exist() -> None:
    missing = []
    for name, quoted in _quoted():
        if match := re.match(r"llava-compete ([a-z][\w-]*)(?: ([a-z][\w-]*))?", quoted):
            first, second = match.groups()
            if (first,) not in COMMANDS and not (first in GROUPS and (second is None or (first, second) in COMMANDS)):
                missing.append(f"{name}: {quoted}")
        if match := re.match(r"bash (scripts/[\w./-]+)", quoted):
            missing += [] if (ROOT / match[1]).is_file() else [f"{name}: {quoted}"]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("phrase", ["Called by ", "Caller: ", "Callers: "])
def test_no_text_says_who_calls_it(phrase: str) -> None:
    assert [name for name, text in _texts() if phrase in text and name != "tests/test_prose.py"] == []
