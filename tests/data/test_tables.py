"""Tables and the cache they lie in: whole or made again, one a file, no larger than Arrow's columns can be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_compete.data import conversion, mapped_table, tables
from llava_compete.data.config import SourceSection
from llava_compete.data.tables import load_source
from llava_compete.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(name: str | None, image: bytes | str = "a.png") -> dict[str, Any]:
    return {"id": name, "image": image, "conversations": TURNS}


def shards(folder: Path, count: int = 3) -> SourceSection:
    for number in range(count):
        rows = [row(None if n == 1 else f"{number}-{n}", f"{number}{n}".encode()) for n in range(3)]
        write(folder / f"train-{number:05}-of-{count:05}.parquet", rows)
    return SourceSection(name="s", path=folder)


def test_a_table_a_file_and_what_is_done_stays_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section, cache = shards(tmp_path / "data"), tmp_path / "cache"
    whole = load_source(section, cache)
    assert len(list(cache.glob("*.arrow"))) == 3
    assert [item["id"] for item in whole.rows] == ["0-0", "1", "0-2", "1-0", "4", "1-2", "2-0", "7", "2-2"]
    assert list(whole.rows.ids()) == [item["id"] for item in whole.rows]
    assert [item["images"][0]["bytes"] for item in whole.rows][3:5] == [b"10", b"11"]
    assert whole.rows.images_per_row().tolist() == [1] * 9
    assert whole.rows.chars().tolist() == [len("\nWhat?That.")] * 9
    # A file with a bad row fails the source, and the others need not be converted again.
    write(tmp_path / "data" / "train-00003-of-00003.parquet", [row("x"), {**row("y"), "conversations": TURNS[:1]}])
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    with pytest.raises(UserError, match=r"1 rows of .* the first: row 1 of train-00003-of-00003\.parquet"):
        load_source(section, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.arrow")} == before
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize("count", [1, 3])
def test_the_bar_counts_rows_over_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    monkeypatch.setattr(conversion, "_SILENT_S", 0)
    load_source(shards(tmp_path / "data", count), tmp_path / "cache")
    assert f"{3 * count} rows" in capsys.readouterr().err


def test_batches_are_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand rows of 2 MiB, of pictures or of text, do not fit into one column of 32-bit offsets."""
    monkeypatch.setattr(conversion, "_BYTES_PER_BATCH", 3000)
    turns = [TURNS[0], {"from": "gpt", "value": "a" * 2000}]
    books = [{**row(str(number)), "conversations": turns} for number in range(5)]
    source = load_source(SourceSection(name="s", path=write(tmp_path / "a.jsonl", books)), tmp_path / "cache")
    assert [len(batch) for batch in source.rows.tables[0].to_batches()] == [2, 2, 1]
    rows = [row(str(number), bytes([number]) * 1200) for number in range(10)]
    source = load_source(SourceSection(name="s", path=write(tmp_path / "a.parquet", rows)), tmp_path / "cache")
    assert [len(batch) for batch in source.rows.tables[0].to_batches()] == [3, 3, 3, 1]
    assert [item["images"][0]["bytes"] for item in source.rows] == [item["image"] for item in rows]
    assert mapped_table.SCHEMA.field("images").type.value_type.field("bytes").type == pa.large_binary()


@pytest.mark.parametrize("damage", ["empty", "cut", "cut between batches", "zeros", "garbage"])
def test_a_table_that_is_not_whole_is_made_again(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conversion, "_ROWS_PER_BATCH", 1)
    section = SourceSection(name="s", path=write(tmp_path / "a.jsonl", [row("0"), row("1")]))
    expected = list(load_source(section, tmp_path / "cache").rows)
    (table,) = (tmp_path / "cache").glob("*.arrow")
    content = table.read_bytes()
    wrong = {
        "empty": b"",
        "cut": content[:-30],
        "cut between batches": content[:-8],
        "zeros": bytes(len(content)),
        "garbage": b"?" * 100,
    }
    table.write_bytes(wrong[damage])
    assert list(load_source(section, tmp_path / "cache").rows) == expected
    assert table.read_bytes() == content
    assert "not a whole table" in caplog.text


def test_tables_are_not_held_open_and_none_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of more files than a process may open lost the rows of those beyond."""
    section, before = shards(tmp_path / "data"), len(os.listdir("/proc/self/fd"))
    source = load_source(section, tmp_path / "cache")
    assert len(source.rows) == 9
    assert len(os.listdir("/proc/self/fd")) == before
    next((tmp_path / "cache").glob("*.arrow")).unlink()
    monkeypatch.setattr(tables, "convert_all", lambda *_: None)  # as if what it wrote could not be opened
    with pytest.raises(UserError, match=r"\.arrow was just written and cannot be opened"):
        load_source(section, tmp_path / "cache")


def test_left_over_partial_files_are_cleared(tmp_path: Path) -> None:
    section = SourceSection(name="s", path=write(tmp_path / "a.jsonl", [row("0")]))
    load_source(section, tmp_path / "cache")
    (table,) = (tmp_path / "cache").glob("*.arrow")
    table.unlink()
    left_over = table.with_name(f".{table.name}.12345.partial")
    left_over.write_bytes(b"half a table")
    load_source(section, tmp_path / "cache")
    assert table.exists()
    assert not left_over.exists()


def test_a_table_that_is_there_needs_no_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every folder can be written to, so writing is made to fail."""
    section = SourceSection(name="s", path=write(tmp_path / "a.jsonl", [row("0")]))
    expected = list(load_source(section, tmp_path / "cache").rows)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    for name in ("mkdir", "touch", "write_text", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr(os, "open", refused)  # the lock's
    assert list(load_source(section, tmp_path / "cache").rows) == expected
    other = SourceSection(name="s", path=tmp_path / "b.jsonl")
    with other.path.open("w") as file:  # type: ignore[union-attr]
        file.write(json.dumps(row("1")) + "\n")
    with pytest.raises(UserError, match=r"cache: tables of data source 's' cannot be written: .*data\.cache_dir"):
        load_source(other, tmp_path / "cache")


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = SourceSection(name="s", path=write(tmp_path / "a.jsonl", [row("0")]))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        load_source(section, tmp_path / "cache")
    monkeypatch.undo()
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".arrow", ".partial")]


def test_images_first_is_a_setting_of_the_reader_not_of_the_table(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?\n<image>"}, TURNS[1]]
    path = write(tmp_path / "a.jsonl", [{**row("0"), "conversations": turns}])
    texts = []
    for first in (False, True):
        source = load_source(SourceSection(name="s", path=path, images_first=first), tmp_path / "cache")
        parts = source.messages(source.rows.row(0))[0]["content"]
        texts.append("".join(part.get("text", "<image>") for part in parts))
    assert texts == ["What?\n<image>", "<image>\nWhat?"]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", [{**row("0"), "score": 1}, {**row("1"), "score": 2, "tools": ["x"]}])
    load_source(SourceSection(name="s", path=path), tmp_path / "cache")
    (record,) = [record for record in caplog.records if "nothing reads" in record.message]
    assert record.message.endswith("score, tools")
