"""Documents come out the same from every file format and from any position, and broken input is named."""

import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset

from llava_compete.config import parse_config
from llava_compete.data.text.config import TextSection, TextSource
from llava_compete.data.text.sources import digest, read_source, read_train, read_validation
from llava_compete.errors import UserError

TEXTS = [f"document {number}: äöü\n" + "word " * number for number in range(23)]


def write(folder, kind):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    path = folder / f"part.{kind}"
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        halves = lines.encode()[:100], lines.encode()[100:]
        path.write_bytes(b"".join(map(zstandard.compress, halves)))  # two frames, as pzstd writes them
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("skip", [0, 7, 22, 23, 30, 46])
def test_every_format_gives_the_same_documents_from_any_position(tmp_path, kind, skip):
    path = write(tmp_path, kind)
    source = TextSource(path=[path, path])
    assert list(read_source(source, skip)) == (TEXTS + TEXTS)[skip:]


def test_plain_text_is_cut_into_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"line {number} of a long book\n" for number in range(10_000))
    (tmp_path / "book.txt").write_text(text)
    pieces = list(read_source(TextSource(path=tmp_path)))
    assert len(pieces) > 2
    assert "".join(pieces) == text
    assert list(read_source(TextSource(path=tmp_path), skip=2)) == pieces[2:]


def test_training_order_is_the_same_from_any_position_and_anew_in_each_epoch(tmp_path):
    section = TextSection(train=TextSource(path=write(tmp_path, "jsonl")), shuffle_block=10)
    whole = list(itertools.islice(read_train(section, seed=3), 60))
    assert sorted(document.text for document in whole[:23]) == sorted(TEXTS)
    assert [d.text for d in whole[:23]] != [d.text for d in whole[23:46]]
    for start in (0, 4, 10, 22, 23, 40):
        epoch, number = whole[start].epoch, whole[start].number
        assert list(itertools.islice(read_train(section, 3, epoch, number), 15)) == whole[start : start + 15]


def test_held_out_documents_are_not_trained_on(tmp_path):
    section = TextSection(train=TextSource(path=write(tmp_path, "jsonl")), validation_fraction=0.3)
    held_out = list(read_validation(section))
    trained = [document.text for document in itertools.islice(read_train(section, 0), 40)]
    assert 0 < len(held_out) < 23
    assert set(held_out) | set(trained) == set(TEXTS)
    assert not set(held_out) & set(trained)


def test_a_held_out_share_that_leaves_nothing_is_named(tmp_path):
    section = TextSection(train=TextSource(path=write(tmp_path, "jsonl")), validation_fraction=0.999)
    with pytest.raises(UserError, match="found 23 documents and none to train on"):
        next(read_train(section, seed=0))


def test_half_surrogate_pairs_do_not_reach_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 and whole \\ud83d\\ude42"}\n')
    assert list(read_source(TextSource(path=tmp_path))) == ["half ? and whole 🙂"]


def test_a_hub_source_streams_and_skips(monkeypatch):
    calls = []

    def load_dataset(name, subset, *, split, revision, streaming):
        calls.append((name, subset, split, revision, streaming))
        return Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = TextSource(hub="HuggingFaceFW/fineweb-edu", subset="sample-10BT")
    assert list(read_source(source, skip=20)) == TEXTS[20:]
    assert calls == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", None, True)]


def test_the_digest_follows_the_content(tmp_path):
    path = write(tmp_path, "jsonl")
    first = digest(TextSource(path=path))
    path.write_text(path.read_text().replace("document 5", "document x"))
    assert digest(TextSource(path=path)) != first


LONG = " ".join(map(str, range(5000)))


def damaged(content):
    """Some bytes in the middle are others."""
    return content[:200] + b"\xff" * 50 + content[250:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"content": "x"}\n', "under 'text', found content"),
        ("a.jsonl", b"[1]\n", "found list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], "cannot be read to its end"),
        ("a.jsonl.gz", damaged(gzip.compress(json.dumps({"text": LONG}).encode(), mtime=0)), "cannot be read to its"),
        ("a.jsonl.zst", b"not zstandard", "cannot be read to its end"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3], "ends inside a compressed frame"),
        ("a.parquet", b"not parquet", "not a parquet file"),
        ("a.csv", b"text\n", "unknown kind of file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_source(TextSource(path=tmp_path / name)))
    assert name in str(error.value)


@pytest.mark.parametrize("row", [b"[" * 100_000, b'{"text": "a", "n": ' + b"1" * 5000 + b"}"])
def test_json_that_python_cannot_hold_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_bytes(row + b"\n")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        list(read_source(TextSource(path=tmp_path / "a.jsonl")))


def test_a_folder_is_all_below_it_of_one_kind(tmp_path):
    for name in ("a/1.jsonl", "b.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl", "a/._1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8-sig")
    assert list(read_source(TextSource(path=tmp_path))) == ["a/1.jsonl", "b.jsonl"]
    (tmp_path / "SHA256SUMS.txt").write_text("0" * 64)
    with pytest.raises(UserError, match=r"both \.jsonl and \.txt files in this folder"):
        list(read_source(TextSource(path=tmp_path)))


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), tmp_path / f"{name}.parquet")
    for path in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(UserError, match="holds the splits test, train"):
            list(read_source(TextSource(path=path)))
    assert list(read_source(TextSource(path=tmp_path / "train-*.parquet"))) == ["train-00000-of-00001"]
    with pytest.raises(UserError, match="no file of this pattern"):
        list(read_source(TextSource(path=tmp_path / "dev-*.parquet")))


@pytest.mark.parametrize("value", [None, 3])
def test_parquet_rows_without_text_are_named(tmp_path, value):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [value, value]}), path)
    with pytest.raises(UserError, match=rf"a\.parquet: row group 0, row 0: expected a text .* found {value}"):
        list(read_source(TextSource(path=path)))


def test_missing_files_and_contradicting_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match="no text file found"):
        list(read_source(TextSource(path=tmp_path / "nothing.jsonl")))
    with pytest.raises(UserError, match="either path or hub"):
        parse_config(TextSection, {"train": {}}, source="x.yaml")
    content = {"train": {"path": "a"}, "validation": {"path": "b"}, "validation_fraction": 0.1}
    with pytest.raises(UserError, match="validation_fraction"):
        parse_config(TextSection, content, source="x.yaml")
