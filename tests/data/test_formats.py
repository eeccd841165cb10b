"""Files of every format that is read give the same rows: lists, lines, tables, tars, folders of tables."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rows_kit import MESSAGES, png, row, section

from llava_compete.check.check import check_data
from llava_compete.data.dataset import build_datasets
from llava_compete.data.records import RecordError, parse_row
from llava_compete.data.source_files import read_rows
from llava_compete.errors import UserError


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_formats_give_the_same_rows(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(png())
    rows = [row("0"), row("1", None), row("2")]
    (tmp_path / "list.json").write_text("\ufeff " + json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    embedded = [{**item, "image": {"bytes": png(), "path": None} if "image" in item else None} for item in rows]
    pq.write_table(pa.Table.from_pylist(embedded), tmp_path / "table.parquet")
    (tmp_path / "tars").mkdir()
    files = []
    for item in rows:
        files.append((f"{item['id']}.json", json.dumps({key: item[key] for key in ("id", "conversations")}).encode()))
        files += [(f"{item['id']}.png", png())] if "image" in item else []
    write_tar(tmp_path / "tars" / "0.tar", files)
    read = {}
    for name in ("list.json", "lines.jsonl", "table.parquet", "tars"):
        bundle = build_datasets(section(tmp_path, {"name": "s", "path": tmp_path / name}), processor, 0)
        read[name] = [bundle.train[index] for index in range(len(bundle.train))]
    for items in read.values():
        for item, expected in zip(items, read["list.json"], strict=True):
            assert item["sample_id"] == expected["sample_id"]
            assert torch.equal(item["input_ids"], expected["input_ids"])
            assert (item["pixel_values"] is None) == (expected["pixel_values"] is None)
            assert item["pixel_values"] is None or torch.equal(item["pixel_values"], expected["pixel_values"])


def test_a_long_list_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_compete.data.json_rows._CHUNK", 7)
    rows = [row(str(index), answer="x" * index) for index in range(40)]
    path = tmp_path / "rows.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent))
        assert list(read_rows(path)) == rows
    path.write_text(json.dumps([1, 23, "a"]) + "\n")
    assert list(read_rows(path)) == [1, 23, "a"]
    path.write_text("[]")
    assert list(read_rows(path)) == []
    path.write_text(json.dumps(rows)[:-50])
    assert isinstance(list(read_rows(path))[-1], RecordError)


def test_a_table_may_have_a_null_in_place_of_each_missing_key(tmp_path):
    """Parquet writes every column in every row."""
    rows = [row("0"), {"id": "1", "messages": MESSAGES, "images": ["a", "b"]}]
    rows[0]["conversations"][0]["role"] = None
    keys = {key for item in rows for key in item}
    table = [{key: item.get(key) for key in sorted(keys)} for item in rows]
    table[1]["messages"] = [{"role": m["role"], "content": None, "value": str(m["content"])} for m in MESSAGES[1:]]
    table[1]["images"] = None
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    first, second = (parse_row(raw, "?") for raw in read_rows(tmp_path / "rows.parquet"))
    assert first == parse_row(row("0"), "?")
    assert [message["role"] for message in second.messages] == ["user", "assistant"]


def test_tars_keep_the_order_of_images_and_rows_of_one_name(tmp_path):
    content = json.dumps({"conversations": row("")["conversations"]}).encode()
    numbered = [(f"a.{number}.png", str(number).encode()) for number in range(12)]
    write_tar(tmp_path / "rows.tar", [("a.json", content), *numbered, ("a.json", content), ("a.0.png", b"other")])
    first, second = read_rows(tmp_path / "rows.tar")
    assert [image["bytes"] for image in first["image"]] == [str(number).encode() for number in range(12)]
    assert [image["bytes"] for image in second["image"]] == [b"other"]


@pytest.mark.parametrize(
    ("listed", "shown", "ignored"),
    [
        ({"images": ["p/a.right.png", "p/A.left.png"]}, [b"r", b"l"], ["mask.png"]),
        ({"image": "left.png", "images": []}, [b"l"], ["mask.png", "right.png"]),
        ({"image": ["left.png", "left.png"]}, [b"l", b"l"], ["mask.png", "right.png"]),
        ({"images": ["COCO_1.png", "a.left.png"]}, [b"l", b"m", b"r"], ["images"]),
        ({}, [b"l", b"m", b"r"], []),
    ],
)
def test_a_tars_pictures_are_those_that_the_row_names_in_its_order(tmp_path, listed, shown, ignored):
    turns = [{"from": "human", "value": "<image>" * len(shown)}, {"from": "gpt", "value": "x"}]
    content = json.dumps({**listed, "conversations": turns}).encode()
    files = [("a.json", content), ("a.left.png", b"l"), ("a.mask.png", b"m"), ("a.right.png", b"r")]
    write_tar(tmp_path / "rows.tar", files)
    (found,) = (parse_row(raw, "?") for raw in read_rows(tmp_path / "rows.tar"))
    assert found.images == shown
    assert sorted(text for _, text in found.notes) == ignored


def test_no_member_of_a_tar_is_lost_in_silence(tmp_path):
    """A picture of any kind is one; what is none is refused as its key in a row would be, or named."""
    turns = json.dumps({"conversations": row("", None)["conversations"]}).encode()
    files = [("a.avif", b"1"), ("a.txt", b"a dog"), ("b.txt", b"a cat"), ("c.mp4", b"1"), ("c.txt", b"rain")]
    files += [("d.json", turns), ("d.mp4", b"1"), ("e.json", turns), ("e.cls", b"3"), ("e.txt", b"said before")]
    write_tar(tmp_path / "rows.tar", files)
    avif, alone, film, film_with_turns, others = read_rows(tmp_path / "rows.tar")
    assert parse_row(avif, "?").images == [b"1"]
    assert (alone.kind, film.kind) == ("image_missing", "image_missing")
    with pytest.raises(RecordError, match="video: this package trains on images and text only"):
        parse_row(film_with_turns, "?")
    assert parse_row(others, "?").notes == [("field_ignored", "cls"), ("field_ignored", "txt")]


def test_images_of_a_folder_of_tables_are_beside_them(tmp_path, processor):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    pq.write_table(pa.Table.from_pylist([row("0")]), folder / "0.parquet")
    data = section(tmp_path, {"name": "s", "path": folder})
    assert build_datasets(data, processor, 0).train[0]["pixel_values"].shape == (1, 3, 4, 4)
    write_tar(folder / "0.tar", [])
    with pytest.raises(UserError, match=r"both parquet and tar files"):
        build_datasets(data, processor, 0)


def test_files_of_several_folders_need_an_image_folder(tmp_path, processor):
    """Each may have an a.png of its own, and that of the first would be shown to the rows of all."""
    files = [tmp_path / name / "rows.json" for name in ("one", "other")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        (file.parent / "a.png").write_bytes(png())
        file.write_text(json.dumps([row(str(number))]))
    source = {"name": "s", "path": files}
    with pytest.raises(UserError, match=r"image a\.png: .* set its image_folder"):
        build_datasets(section(tmp_path, source), processor, 0)
    assert dict(check_data(section(tmp_path, source), None, workers=0).counts) == {"image_reference_invalid": 2}
    there = section(tmp_path, {**source, "image_folder": tmp_path / "one"})
    assert build_datasets(there, processor, 0).train[1]["pixel_values"].shape == (1, 3, 4, 4)
    texts = [tmp_path / "one" / "texts.json", tmp_path / "other" / "texts.json"]
    for file in texts:
        file.write_text(json.dumps([row("2", None)]))
    assert build_datasets(section(tmp_path, {"name": "s", "path": texts}), processor, 0).train[1]["modality"] == 0
