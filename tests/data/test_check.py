"""A folder of broken inputs: the checker names each of them rightly, keeps the good rows, and exits with 1."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tokenizers_for_tests import make_tokenizer

from llava_compete.cli import main
from llava_compete.data.check import check_data
from llava_compete.data.check_output import RowWriter
from llava_compete.data.config import DataSection
from llava_compete.data.row_checks import PROBLEMS, TextSide
from llava_compete.errors import UserError


def turns(question="<image>\nWhat?", answer="That."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(row_id, image="good.png", conversations=None, **extra):
    images = {} if image is None else {"image": image}
    return {"id": row_id, **images, "conversations": turns() if conversations is None else conversations, **extra}


def bomb_png():
    """A valid header that promises 30,000 × 30,000 pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "good.png")
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:-400])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    (folder / "bomb.png").write_bytes(bomb_png())
    (folder / "folder.jpg").mkdir()
    Image.new("RGB", (3, 40)).save(folder / "tiny.png")
    Image.new("RGB", (600, 10)).save(folder / "strip.png")
    Image.new("CMYK", (40, 40)).save(folder / "cmyk.jpg")
    return folder


BROKEN = {
    "not_a_mapping": ["only a text"],
    "no_conversation": [{"id": "a", "image": "good.png"}, {"id": "b", "conversations": []}],
    "turn_not_a_mapping": [row("a", conversations=["What?", "That."])],
    "unknown_role": [row("a", conversations=[{"from": "robot", "value": "<image>"}, *turns()[1:]])],
    "text_missing": [row("a", conversations=[{"from": "human", "value": None}, *turns()[1:]])],
    "content_part_invalid": [
        row("a", None, [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "x"}])
    ],
    "system_not_first": [row("a", conversations=[*turns(), {"from": "system", "value": "Be kind."}])],
    "no_question": [row("a", None, turns()[1:])],
    "turns_out_of_order": [
        row("a", conversations=[*turns()[:1], *turns("again?"), *turns("x")[1:]]),
        row("b", conversations=[*turns(), *turns()[1:]]),
    ],
    "last_question_unanswered": [row("a", conversations=[*turns(), *turns("And?")[:1]])],
    "empty_answer": [row("a", conversations=turns(answer="")), row("b", conversations=turns(answer=" \n"))],
    "empty_question": [row("a", conversations=[*turns(), *turns("")])],
    "image_reference_invalid": [row("a", image=7), row("b", image=["good.png", None])],
    "image_in_answer": [
        row("a", None, [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [{"type": "image"}]}])
    ],
    "placeholder_without_image": [row("a", image=None)],
    "placeholders_do_not_match": [
        row("a", image=["good.png", "good.png"]),
        row("b", conversations=turns("<image><image>")),
    ],
    "image_missing": [row("a", image="gone.png")],
    "image_is_a_folder": [row("a", image="folder.jpg")],
    "image_empty": [row("a", image="empty.jpg")],
    "image_unreadable": [row("a", image="text.jpg")],
    "image_truncated": [row("a", image="truncated.jpg")],
    "image_too_large": [row("a", image="bomb.png")],
    "image_too_small": [row("a", image="tiny.png"), row("b", image="strip.png")],
    "no_answer_in_limit": [row("a", conversations=turns("<image>\n" + "why " * 200))],
    "duplicate_row": [row("a"), row("a")],
    "duplicate_id": [row("a"), row("a", conversations=turns("<image>\nWho?"))],
    "id_missing": [{"image": "good.png", "conversations": turns()}],
    "image_without_placeholder": [row("a", conversations=turns("What?"))],
    "placeholder_in_answer": [row("a", conversations=turns(answer="An <image> tag."))],
    "control_token_in_text": [row("a", conversations=turns(answer="It ends with <|im_end|>."))],
    "image_outside_folder": [row("a", image="../images/good.png")],
    "image_mode": [row("a", image="cmyk.jpg")],
    "undecodable_text": [row("a", conversations=turns(answer="caf\ufffd"))],
    "cut_to_limit": [row("a", conversations=turns() + turns("why " * 200))],
}


def section_of(tmp_path, images, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    source = {"name": "broken", "path": path, "image_folder": images}
    return DataSection(sources=[source], max_length=150, cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def text_side():
    return TextSide(make_tokenizer("byte_bpe", "chatml"), num_image_tokens=16)


@pytest.mark.parametrize("kind", BROKEN)
def test_each_broken_input_has_its_kind(kind, tmp_path, images, text_side):
    rows = BROKEN[kind]
    report = check_data(section_of(tmp_path, images, rows), text_side, workers=0)
    pairs = kind.startswith("duplicate")
    assert dict(report.counts) == {kind: 1 if pairs else len(rows)}
    assert report.sources["broken"].rows == len(rows)
    is_error = PROBLEMS[kind][0]
    assert report.sources["broken"].good_rows == (len(rows) - report.counts[kind] if is_error else len(rows))
    assert bool(report.num_errors) is is_error


def test_every_kind_of_problem_is_shown_here():
    assert set(PROBLEMS) - set(BROKEN) == {"not_json", "template_fails"}  # below
    assert len(PROBLEMS) >= 25


def test_a_list_that_breaks_off_and_a_line_that_is_no_json(tmp_path, images, text_side):
    section = section_of(tmp_path, images, [row("a")])
    whole = json.dumps([row("a"), row("b"), row("c")])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("a")) + "\n{oops\n" + json.dumps(row("b")) + "\n")
    report = check_data(section, text_side, workers=0)
    assert (dict(report.counts), report.sources["broken"].good_rows) == ({"not_json": 1}, 2)
    (tmp_path / "rows.json").write_text(whole[:-30])
    source = {"name": "broken", "path": tmp_path / "rows.json", "image_folder": images}
    report = check_data(DataSection(sources=[source], cache_dir=tmp_path), text_side, workers=0)
    assert (dict(report.counts), report.sources["broken"].good_rows) == ({"not_json": 1}, 2)


def test_a_template_that_refuses_a_row(tmp_path, images):
    tokenizer = make_tokenizer("byte_bpe_bos", "plain")
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no system turns') }}" + original
        report = check_data(section_of(tmp_path, images, [row("a")]), TextSide(tokenizer, 4), workers=0)
    finally:
        tokenizer.chat_template = original
    assert dict(report.counts) == {"template_fails": 1}
    assert "no system turns" in report.first["template_fails"][0].message


def test_token_statistics(tmp_path, images, text_side):
    rows = [row("a"), row("b", None, turns("Why?", "Because."))]
    report = check_data(section_of(tmp_path, images, rows), text_side, workers=0)
    source = report.sources["broken"]
    assert (source.rows, source.images, source.text_only_rows, source.image_tokens) == (2, 1, 1, 16)
    assert 0 < source.supervised_tokens < source.tokens - 16


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


def test_output_never_overwrites_a_source(tmp_path, images):
    section = section_of(tmp_path, images, [row("a")])
    with pytest.raises(UserError, match="is a data source"):
        RowWriter(section.sources[0].path, None, section.sources)
