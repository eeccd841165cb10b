"""What the checker writes: the report, good and bad rows apart, tables; and what its command refuses."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_kit import row, section_of

from llava_compete.check.check import check_data
from llava_compete.check.output import RowWriter
from llava_compete.cli import main
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.errors import UserError


def test_what_cannot_be_read_is_kept_with_its_reason(tmp_path, images):
    section = section_of(tmp_path, images, [row("a")])
    (tmp_path / "rows.jsonl").write_text("{oops\n")
    with RowWriter(None, tmp_path / "bad.jsonl", section.sources) as writer:
        check_data(section, None, workers=0, sink=writer)
    bad = json.loads((tmp_path / "bad.jsonl").read_text())
    assert bad["row"] == "{oops"
    assert bad["reasons"][0].startswith("not_json: rows.jsonl, line 1: ")


def test_command_writes_report_and_both_files_and_exits_with_1(tmp_path, images, capsys):
    section_of(tmp_path, images, [row("a"), row("b", image="gone.png"), row("c")])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data:\n  cache_dir: {tmp_path}\n  sources:\n"
        f"    - {{name: broken, path: {tmp_path}/rows.jsonl, image_folder: {images}}}\n"
    )
    files = {name: tmp_path / name for name in ("report.json", "clean.jsonl", "bad.jsonl")}
    command = ["data", "check", str(config), "--workers", "2", "--json", str(files["report.json"])]
    command += ["--write-clean", str(files["clean.jsonl"]), "--write-bad", str(files["bad.jsonl"])]
    assert main(command) == 1
    assert "image_missing" in capsys.readouterr().out
    report = json.loads(files["report.json"].read_text())
    assert (report["errors"], report["problems"]["image_missing"]["first"][0]["id"]) == (1, "b")
    assert [json.loads(line)["id"] for line in files["clean.jsonl"].open()] == ["a", "c"]
    bad = json.loads(files["bad.jsonl"].read_text())
    assert (bad["row"]["id"], bad["reasons"][0].split(":")[0]) == ("b", "image_missing")
    # The clean file is fit to train on.
    assert main(["data", "check", str(config), f"data.sources=[{{name: clean, path: {files['clean.jsonl']}, "
                 f"image_folder: {images}}}]", "--json", str(files["report.json"])]) == 0  # fmt: skip


def test_command_makes_the_tables_of_good_sources(tmp_path, images):
    section_of(tmp_path, images, [row("a"), row("b")])
    (tmp_path / "bad.jsonl").write_text(json.dumps(row("a", image="gone.png")) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"cache_dir: {tmp_path}/tables\nsources:\n"
        f"  - {{name: good, path: {tmp_path}/rows.jsonl, image_folder: {images}}}\n"
        f"  - {{name: bad, path: {tmp_path}/bad.jsonl, image_folder: {images}}}\n"
    )
    assert main(["data", "check", str(config), "--workers", "1", "--json", str(tmp_path / "r.json"), "--convert"]) == 1
    assert len(list((tmp_path / "tables").glob("*.arrow"))) == 1


def test_max_length_beyond_the_models_context_is_refused_before_the_check(tmp_path, images, capsys):
    section_of(tmp_path, images, [row("a")])
    model = {"model_type": "llama", "hidden_size": 64, "max_position_embeddings": 128}
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{vision_tower: null, language_model: {{config: {json.dumps(model)}}}, tokenizer: {{train_on: data}}}}"
        f"\ndata:\n  max_length: 129\n  cache_dir: {tmp_path}\n  sources:\n"
        f"    - {{name: s, path: {tmp_path}/rows.jsonl, image_folder: {images}}}\n"
    )
    assert main(["data", "check", str(config), "--json", str(tmp_path / "report.json")]) == 2
    assert "data.max_length: found 129, but the language model's context is 128" in capsys.readouterr().err


def test_a_link_that_leads_to_itself_is_one_clear_line(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    config = tmp_path / "config.yaml"
    config.write_text(f"cache_dir: {tmp_path}\nsources: [{{name: s, path: {tmp_path}/loop.jsonl}}]\n")
    report = tmp_path / "report.json"
    assert main(["data", "check", str(config), "--json", str(report)]) == 1
    assert list(json.loads(report.read_text())["problems"]) == ["file_unreadable"]


def test_embedded_images_are_written_as_files(tmp_path, images):
    good = (images / "good.png").read_bytes()
    rows = [
        {**row(str(n)), "image": {"bytes": content, "path": "p.png"}} for n, content in enumerate([good, b"?", good])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    sources = [SourceSection(name="embedded", path=tmp_path / "rows.parquet")]
    section = DataSection(sources=sources, cache_dir=tmp_path / "cache")
    with RowWriter(tmp_path / "good.jsonl", tmp_path / "bad.jsonl", sources) as writer:
        report = check_data(section, None, sink=writer)
    assert dict(report.counts) == {"image_unreadable": 1}
    clean = section.model_copy(update={"sources": [SourceSection(name="clean", path=tmp_path / "good.jsonl")]})
    again = check_data(clean, None)
    assert (again.sources["clean"].good_rows, again.num_errors) == (2, 0)
    bad = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (tmp_path / bad["row"]["image"]).read_bytes() == b"?"


def test_several_sources_are_written_apart_and_stale_files_replaced(tmp_path, images):
    section = section_of(tmp_path, images, [row("a"), row("b", image="gone.png")])
    sources = [source.model_copy(update={"name": name}) for source in section.sources for name in ("one", "two")]
    stale = tmp_path / "bad.two.jsonl"
    stale.write_text("from an earlier run\n")
    with pytest.raises(KeyboardInterrupt), RowWriter(None, tmp_path / "bad.jsonl", sources):
        raise KeyboardInterrupt
    assert stale.read_text() == "from an earlier run\n"
    with RowWriter(tmp_path / "good.jsonl", tmp_path / "bad.jsonl", sources) as writer:
        check_data(section.model_copy(update={"sources": sources[:1]}), None, sink=writer)
    ids = {path.name: [json.loads(line) for line in path.open()] for path in tmp_path.glob("*.*.jsonl")}
    assert {name: len(rows) for name, rows in ids.items()} == {
        "good.one.jsonl": 1, "bad.one.jsonl": 1, "good.two.jsonl": 0, "bad.two.jsonl": 0,
    }  # fmt: skip
    assert not list(tmp_path.glob(".*.partial"))


def test_output_never_overwrites_a_source(tmp_path, images, capsys):
    section = section_of(tmp_path, images, [row("a")])
    source = section.sources[0].path
    with pytest.raises(UserError, match="is a data source"):
        RowWriter(source, None, section.sources)
    with pytest.raises(UserError, match="or another output"):
        RowWriter(tmp_path / "x.jsonl", tmp_path / "x.jsonl", section.sources)
    config = tmp_path / "config.yaml"
    config.write_text(f"sources: [{{name: s, path: {source}}}]\n")
    before = source.read_bytes()
    assert main(["data", "check", str(config), "--json", str(source)]) == 2
    assert "is a data source" in capsys.readouterr().err
    assert source.read_bytes() == before
    # Said before the check, not after it.
    assert main(["data", "check", str(config), "--json", str(source / "report.json")]) == 2
    assert "its folder cannot be made" in capsys.readouterr().err
    assert main(["data", "check", str(config), "--json", str(images)]) == 2
    assert "a folder" in capsys.readouterr().err
