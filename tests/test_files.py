"""Files are whole or absent, have the umask's mode, and JSON lines end at line breaks only."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO, Any

import pytest

from llava_compete.errors import UserError
from llava_compete.files import (
    new_directory,
    read_json,
    read_json_lines,
    write_figure,
    write_json,
    write_json_lines,
    write_text,
)


def test_json_lines_hold_any_text(tmp_path: Path) -> None:
    rows = [{"a": "x\u2028y\u2029z\u0085\x0b\x0c\x1c\r\n"}, [1, None], "\ud83d"]
    write_json_lines(tmp_path / "a.jsonl", rows)
    assert list(read_json_lines(tmp_path / "a.jsonl")) == rows
    (tmp_path / "b.jsonl").write_bytes('{"a": "x\u2028y\u0085z"}\r\n\n{"a": 2}\n'.encode())
    assert list(read_json_lines(tmp_path / "b.jsonl")) == [{"a": "x\u2028y\u0085z"}, {"a": 2}]


def test_a_file_that_grows_may_break_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\n{"n": 1')
    assert list(read_json_lines(path, may_break_off=True)) == [{"n": 0}, {"n": 1}]
    with pytest.raises(UserError, match=r"a\.jsonl:3: not valid JSON"):
        list(read_json_lines(path))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_figures_and_folders_are_whole_or_absent(tmp_path: Path) -> None:
    class Broken:
        def savefig(self, file: IO[bytes], **_: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    write_text(tmp_path / "a.png", "old")
    with pytest.raises(OSError, match="No space left"):
        write_figure(tmp_path / "a.png", Broken(), dpi=100)
    assert (tmp_path / "a.png").read_text() == "old"

    def fill_half() -> None:
        with new_directory(tmp_path / "b") as partial:
            write_figure(partial / "a.png", Broken(), dpi=100)

    with pytest.raises(OSError, match="No space left"):
        fill_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "of a kill").touch()
    with new_directory(tmp_path / "b") as partial:
        (partial / "whole").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b", "whole"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_the_umasks(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode
