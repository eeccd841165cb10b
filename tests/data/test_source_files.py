"""Which files a source names, every format of them, and files that are broken in ways a reader might not notice."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llava_compete.config import parse_config
from llava_compete.data.config import SourceSection
from llava_compete.data.readers import FORMATS, Format, read_file
from llava_compete.data.records import RecordError, parse_row
from llava_compete.data.source_files import SourceError, file_digests, read_rows, source_files
from llava_compete.errors import UserError

ROWS = [{"id": str(n), "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]} for n in "12"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(path: Path, content: bytes = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def _by_name(value: str | bytes) -> str:
    """Compressed bytes hold the time, and test processes must agree on a test's name."""
    return value if isinstance(value, str) else "content"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", LINES),  # lines under the name of a list
        ("rows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("rows.jsonl.zst", zst(LINES)),
        ("rows.jsonl.zst", zst(LINES[: LINES.index(b"\n") + 1]) + zst(LINES[LINES.index(b"\n") + 1 :])),
    ],
    ids=_by_name,
)
def test_formats_of_json(tmp_path: Path, name: str, content: bytes) -> None:
    assert list(read_rows(write(tmp_path / name, content))) == ROWS


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"id": "a\u2028b", "text": "\u2029\u0085\x0b\x0c"}, {"id": "c"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    assert list(read_rows(write(tmp_path / "rows.jsonl", content))) == rows


def parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES)[:-9]),
        ("cut.jsonl.zst", zst(LINES * 50)[:-5]),
        ("no.jsonl.gz", b"hello"),
        ("no.jsonl.zst", b"hello"),
        ("mapping.json", b'{"rows": []}\n'),
        ("pretty.json", json.dumps(ROWS[0], indent=1).encode()),
        ("no.parquet", b"PAR1 hello PAR1"),
        ("twice.parquet", parquet_bytes(pa.table([[1], [2]], ["id", "id"]))),
    ],
    ids=_by_name,
)
def test_a_file_that_breaks_off_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    rows = list(read_rows(write(tmp_path / name, content)))
    assert isinstance(rows[-1], RecordError)
    assert rows[-1].kind == "file_unreadable"
    assert name in str(rows[-1])


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.tar"])
def test_a_key_that_stands_twice_is_named_and_the_rows_around_it_are_read(tmp_path: Path, name: str) -> None:
    """In the row itself, and in a turn; Python would keep the last value."""
    good, turns = json.dumps(ROWS[0]), json.dumps(ROWS[0]["conversations"])
    row = f'{{"id": "2", "conversations": [], "conversations": {turns}}}'
    turn = f'{{"id": "3", "conversations": {turns[:-2]}, "value": "c"}}]}}'
    texts = [good, row, turn, good]
    contents = {
        "rows.json": f"[{', '.join(texts)}]".encode(),
        "rows.jsonl": "\n".join(texts).encode(),
        "rows.tar": tar_bytes({f"{number}.json": text.encode() for number, text in enumerate(texts)}),
    }
    first, of_row, of_turn, last = read_rows(write(tmp_path / name, contents[name]))
    assert first["conversations"] == last["conversations"] == ROWS[0]["conversations"]
    assert [(error.kind, error.text) for error in (of_row, of_turn)] == [("key_twice", row), ("key_twice", turn)]
    places = {"rows.json": "rows.json: ", "rows.jsonl": "rows.jsonl, line 2: ", "rows.tar": "rows.tar: 1.json: "}
    assert f"{places[name]}the key 'conversations' stands twice in one mapping" in str(of_row)
    assert "the key 'value' stands twice in one mapping" in str(of_turn)


def test_whatever_a_reader_raises_is_a_named_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: Path) -> Any:
        yield {"id": "1"}
        raise KeyError("a bug in some library")

    monkeypatch.setitem(FORMATS, ".odd", Format("odd", broken))  # a new format is one row
    row, error = read_file(write(tmp_path / "a.odd"))
    assert row == {"id": "1"}
    assert error.kind == "file_unreadable"
    assert "a.odd: cannot be read beyond its first 1 rows: KeyError" in str(error)


def tar_bytes(rows: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in rows.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def three_rows() -> dict[str, bytes]:
    turns = json.dumps({"conversations": ROWS[0]["conversations"]}).encode()
    return {f"{name}.{suffix}": turns if suffix == "json" else b"png" for name in "abc" for suffix in ("json", "png")}


def damaged_tars() -> dict[str, bytes]:
    whole = tar_bytes(three_rows())
    second = 2 * (512 + 512)  # where b.json's header begins
    return {
        "flipped header byte": whole[: second + 100] + b"\xff" + whole[second + 101 :],
        "zero block": whole[:second] + bytes(512) + whole[second + 512 :],
        "two zero blocks": whole[:second] + bytes(1024) + whole[second + 1024 :],
        "cut at a boundary": whole[:second],
        "cut in the zeros": whole[: 6 * 1024 + 512],
        "cut in a file": whole[: second + 600],
        "concatenated": whole + whole,
        "garbage behind": whole + b"x",
    }


@pytest.mark.parametrize("damage", damaged_tars())
def test_a_tar_that_does_not_end_properly_is_named(tmp_path: Path, damage: str) -> None:
    rows = list(read_rows(write(tmp_path / "rows.tar", damaged_tars()[damage])))
    assert [row.kind for row in rows if isinstance(row, RecordError)] == ["file_unreadable"]
    assert all(set(row) == {"id", "conversations", "image"} for row in rows[:-1])  # and no half row


def test_whole_tars(tmp_path: Path) -> None:
    for number, content in enumerate([tar_bytes(three_rows()), tar_bytes(three_rows(), format=tarfile.GNU_FORMAT)]):
        assert [row["id"] for row in read_rows(write(tmp_path / f"{number}.tar", content))] == ["a", "b", "c"]
    # A second copy of a picture as a link, as `tar` stores files with one inode.
    buffer = io.BytesIO(tar_bytes({"a.png": b"png"}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, content in {"a.json": three_rows()["a.json"], "b.json": three_rows()["b.json"]}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
    rows = list(read_rows(write(tmp_path / "links.tar", buffer.getvalue())))
    assert [row["image"][0]["bytes"] for row in rows] == [b"png", b"png"]


def test_captions_of_a_webdataset(tmp_path: Path) -> None:
    facts = json.dumps({"width": 20, "url": "https://example.com/a.jpg"}).encode()
    files = {
        "a.JPG": b"one",
        "a.txt": "Ein Apfel \u2028\n".encode(),
        "a.json": facts,
        "b.jpg": b"two",
        "b.txt": b"A pear",
    }
    first, second = (parse_row(row, "?") for row in read_rows(write(tmp_path / "0.tar", tar_bytes(files))))
    assert (first.id, first.images, second.images) == ("a", [b"one"], [b"two"])
    assert first.messages[0]["content"] == [{"type": "image"}]
    assert first.messages[1]["content"] == [{"type": "text", "text": "Ein Apfel \u2028"}]
    (row,) = read_rows(write(tmp_path / "1.tar", tar_bytes({"a.jpg": b"one"})))
    assert row.kind == "no_conversation"


def test_globs_lists_and_folders(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(ROWS), write(tmp_path / "data" / f"{name}.parquet"))
    names = [f"train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert [file.name for file in source_files(tmp_path / "data" / "train-*.parquet")] == names
    listed = [tmp_path / "data" / names[1], tmp_path / "data" / names[0]]
    assert source_files(listed) == listed
    assert len(list(read_rows(listed))) == 4
    for path in (tmp_path / "data", tmp_path, tmp_path / "data" / "*.parquet"):
        with pytest.raises(SourceError, match=r"holds the splits test, train; .*test-\*\.parquet"):
            source_files(path)
    with pytest.raises(SourceError, match="no file of this pattern"):
        source_files(tmp_path / "data" / "dev-*.parquet")
    section = parse_config(SourceSection, {"name": "s", "path": [str(file) for file in listed]}, "c.yaml")
    assert section.images == tmp_path / "data"
    assert SourceSection(name="s", path=tmp_path / "da*" / "x-*.parquet").images == tmp_path
    with pytest.raises(UserError, match="an empty list names no file"):
        parse_config(SourceSection, {"name": "s", "path": []}, "c.yaml")


@pytest.mark.parametrize(
    "names",
    [
        ["train.json", "val.json"],
        ["a/train/0.jsonl", "a/test/0.jsonl"],
        ["chart-00000-of-00001.jsonl", "text-00000-of-00001.jsonl"],
        ["data/rows_train.jsonl.gz", "data/rows_dev.jsonl.gz"],
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, gzip.compress(LINES) if name.endswith("gz") else LINES)
    folder = tmp_path / "a" if names[0].startswith("a/") else tmp_path
    with pytest.raises(SourceError, match="holds the splits"):
        source_files(folder)


def test_folders_of_the_hub(tmp_path: Path) -> None:
    for name in ("ai2d", "chartqa"):  # a folder a configuration
        write(tmp_path / name / "train-00000-of-00001-a1b2.parquet")
    for name in ("README.md", "dataset_infos.json", ".hidden.json", "_notes.json", ".cache/x.json"):
        write(tmp_path / name)
    assert [file.parent.name for file in source_files(tmp_path)] == ["ai2d", "chartqa"]
    write(tmp_path / "json" / "one.json")
    write(tmp_path / "json" / "two.jsonl")
    assert [file.name for file in source_files(tmp_path / "json")] == ["one.json", "two.jsonl"]
    with pytest.raises(SourceError, match="both json and parquet files"):
        source_files(tmp_path)


def test_pipes_and_odd_names_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(SourceError, match="a pipe or device, expected a file"):
            source_files(path)
    for name in ("rows.parquet.gz", "rows.csv", "rows"):
        with pytest.raises(SourceError, match=r"expected \.json, \.json\.gz, \.json\.zst, \.jsonl"):
            source_files(write(tmp_path / name))


def test_an_empty_digest_file_is_no_digest(tmp_path: Path) -> None:
    """A full disk leaves such files; with them, all sources would count as the same one."""
    files = [write(tmp_path / f"{n}.jsonl", n.encode()) for n in ("a", "b")]
    memory = tmp_path / "digests"
    expected = file_digests(files, memory)
    assert len(set(expected)) == 2
    for content in (b"", b"abc", b"\xff" * 64, expected[0][:-1].encode()):
        for file in memory.iterdir():
            file.write_bytes(content)
        assert file_digests(files, memory) == expected
    assert sorted(file.read_text() for file in memory.iterdir()) == sorted(expected)


def test_partial_files_of_killed_writers_are_cleared(tmp_path: Path) -> None:
    memory = tmp_path / "digests"
    old, young = write(memory / ".a.sha256.1.partial"), write(memory / ".b.sha256.2.partial")
    os.utime(old, (0, 0))
    file_digests([write(tmp_path / "a.jsonl")], memory)
    assert not old.exists()
    assert young.exists()


def test_digests_need_no_place_to_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "a.jsonl")
    (tmp_path / "taken").write_text("a file, not a folder")
    assert file_digests([file], tmp_path / "taken") == file_digests([file], tmp_path / "digests")
    assert "cannot be kept" in caplog.text
