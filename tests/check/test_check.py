"""A folder of broken inputs: the checker names each of them rightly, keeps the good rows, and exits with 1."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from check_kit import row, section_of, turns
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import make_tokenizer

from llava_compete.check.check import check_data
from llava_compete.check.clean_rows import with_image_paths
from llava_compete.check.output import RowWriter
from llava_compete.check.row_checks import PROBLEMS, TextSide, check_row
from llava_compete.data.config import DataSection, SourceSection
from llava_compete.data.dataset import build_datasets
from llava_compete.data.tables import load_source
from llava_compete.errors import UserError
from llava_compete.vision.image_decoder import open_image
from llava_compete.vision.image_processing import LlavaCompeteImageProcessor

BROKEN = {
    "not_a_mapping": ["only a text", None, 7, [row("a")]],
    "no_conversation": [
        {"id": "a", "image": "good.png"},
        {"id": "b", "conversations": []},
        {"id": "c", "conversations": {"from": "human"}},
        {"id": "d", "conversations": "y" * 100_000},
    ],
    "turn_not_a_mapping": [row("a", conversations=["What?", "That."])],
    "unknown_role": [row("a", conversations=[{"from": "robot", "value": "<image>"}, *turns()[1:]])],
    "text_missing": [
        row("a", conversations=[{"from": "human", "value": None}, *turns()[1:]]),
        row("b", conversations=[{"from": "human", "value": {"text": "What?"}}, *turns()[1:]]),
        row("c", conversations=[{"from": "human"}, *turns()[1:]]),
    ],
    "content_part_invalid": [
        row("a", None, [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "x"}])
    ],
    "system_not_first": [row("a", conversations=[*turns(), {"from": "system", "value": "Be kind."}])],
    "no_question": [row("a", None, turns()[1:])],
    "turns_out_of_order": [
        row("a", conversations=[*turns()[:1], *turns("again?"), *turns("x")[1:]]),
        row("b", conversations=[*turns(), *turns()[1:]]),
    ],
    "last_question_unanswered": [row("a", conversations=turns()[:1])],
    "last_question_dropped": [row("a", conversations=[*turns(), *turns("And?")[:1]])],
    "first_answer_dropped": [row("a", conversations=[*turns()[1:], *turns()])],
    "field_unsupported": [
        row("a", video="a.mp4"),
        row("b", audio=["a.wav"]),
        row("c", objects={"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}),
    ],
    "field_ignored": [row("a", tools=["search"]), row("b", images=["good.png"]), row("c", messages=turns())],
    "system_twice": [row("a", system="Be brief.", conversations=[{"from": "system", "value": "Hm."}, *turns()])],
    "turn_weight_unsupported": [row("a", conversations=[*turns()[:1], {**turns()[1], "weight": 0.5}])],
    "nothing_to_learn": [row("a", conversations=[*turns()[:1], {**turns()[1], "loss": False}])],
    "answer_not_learnt": [row("a", conversations=[*turns()[:1], {**turns()[1], "weight": 0}, *turns("And?")])],
    "reasoning_not_written": [row("a", conversations=[turns()[0], {**turns()[1], "reasoning_content": "A cat."}])],
    "empty_answer": [row("a", conversations=turns(answer="")), row("b", conversations=turns(answer=" \n"))],
    "empty_question": [row("a", conversations=[*turns(), *turns("")])],
    "not_unicode": [
        row("a", conversations=turns(answer="Half an emoji: \ud83d")),
        row("\ud83d"),
        row("c", image="\ud83d.png"),
    ],
    "image_reference_invalid": [row("a", image=7), row("b", image=["good.png", None]), row("c", image="iVBO" * 2000)],
    "image_in_answer": [
        row("a", None, [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [{"type": "image"}]}])
    ],
    "placeholder_without_image": [row("a", image=None)],
    "placeholders_do_not_match": [
        row("a", image=["good.png", "good.png"]),
        row("b", conversations=turns("<image><image>")),
    ],
    "page_words_invalid": [
        row("a", page_words="Total"),
        row("b", page_words=[{"text": "Total"}]),
        row("c", page_words=[{"text": "Total", "box": [4, 1, 2, 3]}]),
        row("d", page_words=[{"text": " ", "box": [1, 1, 2, 3]}]),
        row("e", None, turns("What?"), page_words=[{"text": "Total", "box": [1, 1, 2, 3]}]),
        row("f", page_words=[{"text": "Total", "box": [1, 1, 2000, 3]}]),
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
    "placeholder_as_text": [
        row("a", conversations=turns(answer="An <image> tag.")),
        row("b", None, [{"role": "user", "content": [{"type": "text", "text": "An <image>?"}]}, *turns()[1:]]),
    ],
    "control_token_in_text": [row("a", conversations=turns(answer="It ends with <|im_end|>."))],
    "image_outside_folder": [row("a", image="../images/good.png")],
    "image_mode": [row("a", image="cmyk.jpg")],
    "undecodable_text": [row("a", conversations=turns(answer="caf\ufffd"))],
    "cut_to_limit": [row("a", conversations=turns() + turns("why " * 200))],
}


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


# What training takes and the check does not: a row that stands there twice, and a picture that is but a sliver.
STRICTER = {"duplicate_row", "image_too_small"}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_check_and_training_agree(kind, tmp_path, images, text_side):
    """Training reads every row that the check lets pass, and refuses the others."""
    processor = SimpleNamespace(
        tokenizer=text_side.tokenizer,
        image_processor=LlavaCompeteImageProcessor(8),
        open_image=open_image,
        num_image_tokens=text_side.num_image_tokens,
        tiling=None,
        tokens_per_image=lambda sizes: text_side.num_image_tokens,
    )
    for number, item in enumerate(BROKEN[kind]):
        section = section_of(tmp_path, images, [item])
        report = check_data(section, text_side, workers=0)
        if report.num_errors and kind not in STRICTER:
            with pytest.raises(UserError):
                _ = build_datasets(section, processor, 0).train[0]
        else:
            assert build_datasets(section, processor, 0).train[0]["length"] > 0, number


def test_every_kind_of_problem_is_shown_here():
    # Below, and what Python cannot write: tests/data/test_source_files.py.
    elsewhere = {"file_unreadable", "not_json", "template_fails", "system_not_written", "key_twice"}
    assert set(PROBLEMS) - set(BROKEN) == elsewhere
    assert len(PROBLEMS) >= 25


ONE, TWO = json.dumps(row("a")), json.dumps(row("b"))
# name -> (content, good rows, rows that are not JSON, files that cannot be read, rows that are not Unicode)
FILES = {
    "empty.json": (b"", 0, 0, 1, 0),
    "blank.json": (b" \n", 0, 0, 1, 0),
    "no_rows.json": (b"[]", 0, 0, 1, 0),
    "mapping.json": (b'{"rows": []}', 0, 0, 1, 0),
    "utf16.json": (f"[{ONE}]".encode("utf-16"), 0, 0, 1, 0),
    "ends_early.json": (f"[{ONE}, {TWO[:-20]}".encode(), 1, 1, 0, 0),
    "ends_after_a_row.json": (f"[{ONE}, {TWO}".encode(), 2, 1, 0, 0),
    "trailing_comma.json": (f"[{ONE},]".encode(), 1, 1, 0, 0),
    "two_lists.json": (f"[{ONE}]\n[{TWO}]".encode(), 1, 1, 0, 0),
    "long_number.json": (f'[{ONE}, {{"id": {"1" * 5000}}}, {TWO}]'.encode(), 1, 1, 0, 0),
    "empty.jsonl": (b"", 0, 0, 1, 0),
    "bad_line.jsonl": (f"{ONE}\n{{oops\n{TWO}\n".encode(), 2, 1, 0, 0),
    "windows.jsonl": (f"\ufeff{ONE}\r\n\r\n{TWO}\r\n".encode(), 2, 0, 0, 0),
    "nested.jsonl": (f"{ONE}\n{'[' * 600}{']' * 600}\n{'[' * 5000}\n{TWO}\n".encode(), 2, 2, 0, 0),
    "long_number.jsonl": (f'{ONE}\n{{"id": {"1" * 5000}}}\n'.encode(), 1, 1, 0, 0),
    "latin1.jsonl": (f"{ONE}\n".encode() + TWO.replace("That", "Th\u00e9").encode("latin-1"), 1, 0, 0, 1),
    "not.parquet": (b"hello", 0, 0, 1, 0),
    "empty.tar": (b"", 0, 0, 1, 0),
    "zeros.tar": (b"\0" * 10240, 0, 0, 1, 0),
    "rows.txt": (ONE.encode(), 0, 0, 1, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_broken_files_are_named_and_every_row_is_written(name, tmp_path, images, text_side):
    content, good, not_json, unreadable, not_unicode = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    section = DataSection(
        sources=[{"name": "broken", "path": path, "image_folder": images}], max_length=150, cache_dir=tmp_path
    )
    files = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    with RowWriter(*files, section.sources) as writer:
        report = check_data(section, text_side, workers=2, sink=writer)
    expected = {"not_json": not_json, "file_unreadable": unreadable, "not_unicode": not_unicode}
    assert dict(report.counts) == {kind: count for kind, count in expected.items() if count}
    assert report.sources["broken"].good_rows == good
    if report.num_errors:
        with pytest.raises(UserError):
            load_source(section.sources[0], tmp_path / "cache")
    else:
        assert len(load_source(section.sources[0], tmp_path / "cache").rows) == good
    written = [[json.loads(line) for line in file.open()] for file in files]
    assert (len(written[0]), sum(map(len, written))) == (good, report.sources["broken"].rows)
    for items in report.first.values():
        assert all(len(item.message) <= 301 and "\n" not in item.message for item in items)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<image>", "\ud83d", "a\0b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "image", "path"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_value_anywhere_in_a_row_is_a_crash(data, text_side):
    """Any JSON in any place of a row: the row is fine or has problems with a name."""
    raw = row("a", conversations=[{"role": "user", "content": [{"type": "text", "text": "What?"}]}, *turns()[1:]])
    place, key = data.draw(
        st.sampled_from(
            [(raw, key) for key in ("id", "image", "images", "conversations", "messages", "system", "video", "other")]
            + [(raw["conversations"], 0), (raw["conversations"], 1)]
            + [(raw["conversations"][0], key) for key in ("from", "role", "value", "content")]
            + [(raw["conversations"][1], key) for key in ("loss", "weight", "reasoning_content", "tool_calls")]
            + [(raw["conversations"][0]["content"], 0)]
            + [
                (raw["conversations"][0]["content"][0], key)
                for key in ("type", "image", "image_url", "index", "base64")
            ]
        )
    )
    if data.draw(st.booleans()):
        raw["conversations"][0]["content"][0]["type"] = "image"
    if data.draw(st.booleans()):
        raw["texts"] = [{"user": "What?", "assistant": "That."}]
        del raw["conversations"]
        place, key = (raw, "texts") if data.draw(st.booleans()) else (raw["texts"][0], "assistant")
    place[key] = data.draw(_JSON)
    source = SourceSection(name="s", path="nowhere/rows.json", images_first=data.draw(st.booleans()))
    facts = check_row(source, raw, 0, text_side, 150)
    assert {kind for kind, _ in facts.problems} <= set(PROBLEMS)
    json.dumps(with_image_paths(raw, source, Path("elsewhere/clean.jsonl")))


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


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_system_text_that_the_template_leaves_out(template, tmp_path, images):
    rows = [row("a", system="Be brief."), row("b")]
    tokenizer = make_tokenizer("byte_bpe_bos", template)
    report = check_data(section_of(tmp_path, images, rows), TextSide(tokenizer, 4), workers=0)
    assert dict(report.counts) == ({"system_not_written": 1} if template == "plain" else {})


def test_token_statistics(tmp_path, images, text_side):
    rows = [row("a"), row("b", None, turns("Why?", "Because."))]
    report = check_data(section_of(tmp_path, images, rows), text_side, workers=0)
    source = report.sources["broken"]
    assert (source.rows, source.images, source.text_only_rows, source.image_tokens) == (2, 1, 1, 16)
    assert 0 < source.supervised_tokens < source.tokens - 16


def test_a_source_that_is_not_there_does_not_hide_the_others(tmp_path, images, text_side):
    section = section_of(tmp_path, images, [row("a"), row("b", image="gone.png")])
    gone = SourceSection(name="gone", path=tmp_path / "gone.json")
    report = check_data(section.model_copy(update={"sources": [gone, *section.sources]}), text_side, workers=0)
    assert dict(report.counts) == {"file_unreadable": 1, "image_missing": 1}
    assert "gone.json: no such file" in report.first["file_unreadable"][0].message
    assert (report.sources["gone"].rows, report.sources["broken"].rows) == (0, 2)


def test_problems_count_rows(tmp_path, images):
    report = check_data(section_of(tmp_path, images, [row("a", image=["x", "y"], conversations=turns("Two?"))]), None)
    assert report.counts["image_missing"] == 1


def test_rows_without_an_id_are_no_duplicates(tmp_path, images):
    anonymous = {"image": "good.png", "conversations": turns()}
    report = check_data(section_of(tmp_path, images, [anonymous, row("0"), row("2"), anonymous]), None)
    assert dict(report.counts) == {"id_missing": 2}
