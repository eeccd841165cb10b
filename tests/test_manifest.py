"""What a run records of its source."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llava_compete import manifest


def test_the_commit_is_that_of_this_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *person, *words], check=True, capture_output=True)

    installed = tmp_path / ".venv" / "llava_compete"
    installed.mkdir(parents=True)
    (installed / "manifest.py").touch()
    (tmp_path / "theirs.py").touch()
    git("init")
    git("add", "theirs.py")
    git("commit", "-m", "theirs")
    monkeypatch.setattr(manifest, "__file__", str(installed / "manifest.py"))
    assert manifest.git_state() == {}
    git("add", ".venv")
    git("commit", "-m", "ours")
    assert manifest.git_state().keys() == {"commit", "dirty"}
    assert manifest.last_change("moe") is None
    for room in ("moe", "train"):
        (installed / room).mkdir()
        (installed / room / "a.py").touch()
        assert manifest.last_change(room) is None  # no commit has it
        git("add", ".venv")
        git("commit", "-m", room)
    assert manifest.last_change("train") == manifest.git_state()["commit"] != manifest.last_change("moe")
