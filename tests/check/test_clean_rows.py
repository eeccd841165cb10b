"""A row that the check calls good is good in the file that `--write-clean` makes, wherever that lies."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_compete.check.check import check_data
from llava_compete.check.output import RowWriter
from llava_compete.data.config import DataSection
from llava_compete.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(buffer, "PNG")
    return buffer.getvalue()


def rows_with_paths() -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": "img/a.png"}, {"type": "text", "text": "what"}]
    answer = {"role": "assistant", "content": "red"}
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    return [
        {"id": "path", "image": "img/a.png", "conversations": TURNS},
        {"id": "list", "images": [{"path": "img/a.png"}], "conversations": json.dumps(TURNS)},
        {"id": "inline", "messages": [{"role": "user", "content": parts}, answer]},
        {"id": "inline in a text", "messages": json.dumps([{"role": "user", "content": parts}, answer])},
        {"id": "data url", "image": url, "conversations": TURNS},
    ]


def make_source(folder: Path, kind: str) -> dict[str, Any]:
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "a.png").write_bytes(png())
    source: dict[str, Any] = {"name": "s", "path": folder / "rows.jsonl"}
    if kind in ("beside", "elsewhere"):
        source["path"] = (folder / "rows" if kind == "elsewhere" else folder) / "rows.jsonl"
        source["path"].parent.mkdir(exist_ok=True)
        source["path"].write_text("".join(json.dumps(row) + "\n" for row in rows_with_paths()))
        return source | ({"image_folder": folder} if kind == "elsewhere" else {})
    images = {"bytes": png(), "struct": {"bytes": png(), "path": "a.png"}, "struct with a folder": {"bytes": png()}}
    source["path"] = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": "1", "image": images[kind], "conversations": TURNS}]), source["path"])
    return source | ({"image_folder": folder / "img"} if "folder" in kind else {})


@pytest.mark.parametrize("kind", ["beside", "elsewhere", "bytes", "struct", "struct with a folder"])
def test_the_clean_file_passes_the_check(tmp_path: Path, kind: str) -> None:
    source = make_source(tmp_path / "src", kind)
    section = DataSection(sources=[source], cache_dir=tmp_path / "cache")
    clean = tmp_path / "some" / "where" / "clean.jsonl"
    with RowWriter(clean, None, section.sources) as writer:
        report = check_data(section, None, workers=0, sink=writer)
    assert report.num_errors == 0
    again = check_data(DataSection(sources=[source | {"path": clean}], cache_dir=tmp_path / "cache"), None, workers=0)
    assert (again.num_errors, again.sources["s"].good_rows) == (0, report.sources["s"].rows)
    assert again.sources["s"].images == report.sources["s"].images


def test_two_checks_with_one_output_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DataSection(sources=[make_source(tmp_path / "src", "beside")], cache_dir=tmp_path / "cache")
    (source,) = section.sources
    one = RowWriter(tmp_path / "clean.jsonl", None, section.sources)
    with one:
        one(source, {"id": "one", "conversations": TURNS}, [])
        monkeypatch.setattr("llava_compete.check.output.os.getpid", lambda: 7)
        with RowWriter(tmp_path / "clean.jsonl", None, section.sources) as two:
            for _ in range(1000):
                two(source, {"id": "two", "conversations": TURNS}, [])
        monkeypatch.undo()
    assert [json.loads(line)["id"] for line in (tmp_path / "clean.jsonl").open()] == ["one"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = DataSection(sources=[make_source(tmp_path / "src", "bytes")], cache_dir=tmp_path / "cache")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_compete.check.clean_rows.write_bytes", full)
    with (
        pytest.raises(UserError, match=r"clean\.jsonl: cannot be written: .*No space left"),
        RowWriter(tmp_path / "clean.jsonl", None, section.sources) as writer,
    ):
        check_data(section, None, workers=0, sink=writer)
    assert not list(tmp_path.glob("*clean*"))
    monkeypatch.undo()
    with (
        pytest.raises(UserError, match=r"clean\.jsonl: cannot be written: .*No space left"),
        RowWriter(tmp_path / "clean.jsonl", None, section.sources) as writer,
    ):
        monkeypatch.setattr(Path, "replace", full)  # as closing the file may fail
    assert not list(tmp_path.glob("*clean*"))


def test_rows_longer_than_the_models_context_are_refused_before_the_start() -> None:
    section = DataSection(sources=[{"name": "s", "path": "rows.jsonl"}], max_length=2048)
    section.check_context(2048)
    section.check_context(None)
    with pytest.raises(UserError, match=r"data\.max_length: found 2048, but the language model's context is 1024"):
        section.check_context(1024)
