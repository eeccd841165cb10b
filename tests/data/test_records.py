"""What a row means is kept or refused: every spelling of turns and images, and the text as it is in the file."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from llava_compete.data.records import RecordError, parse_row
from llava_compete.data.row_images import images_first


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def parts(content: str) -> list[dict[str, str]]:
    """The parts of a text in which <image> stands for an image."""
    found: list[dict[str, str]] = []
    for index, piece in enumerate(content.split("<image>")):
        found += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * (piece != "")
    return found


def rejected(row: Any) -> str:
    with pytest.raises(RecordError) as caught:
        parse_row(row, "0")
    return caught.value.kind


@pytest.mark.parametrize(
    "text", ["Describe.\n<image>", "<image>\nWhat?", "<image>What?", "A <image> and\n\n<image>, which?", " <image> "]
)
def test_the_white_space_around_a_placeholder_is_that_of_the_file(text: str) -> None:
    images = ["a.png", "b.png"][: text.count("<image>")]
    conversation = parse_row({"image": images, "conversations": turns(text, " An answer.\n")}, "0")
    assert conversation.messages[0]["content"] == parts(text)
    assert conversation.messages[1]["content"] == [{"type": "text", "text": " An answer.\n"}]
    assert conversation.images == images


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # LLaVA's preprocess_multimodal: value.replace("<image>", "").strip(), "<image>\n" + value, .strip()
        ("Describe.\n<image>", "<image>\nDescribe."),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What is <image> this? ", "<image>\nWhat is  this?"),
        ("<image>", "<image>"),
        ("\n<image>\n", "<image>"),
        ("No picture.\n", "No picture.\n"),
        ("One <image> two <image>", "<image>\n<image>\nOne  two"),
    ],
)
def test_images_first_is_llavas_rule(text: str, expected: str) -> None:
    images = ["a.png", "b.png"][: text.count("<image>")]
    conversation = parse_row({"image": images, "conversations": turns(text, "x")}, "0")
    moved = images_first(conversation.messages)
    assert "".join(part.get("text", "<image>") for part in moved[0]["content"]) == expected
    assert conversation.messages[0]["content"] == parts(text)


def test_images_without_a_placeholder_go_before_the_first_question() -> None:
    conversation = parse_row({"images": ["a.png", "b.png"], "conversations": turns("Which?", "b")}, "0")
    assert conversation.messages[0]["content"] == parts("<image>\n<image>\nWhich?")
    assert [kind for kind, _ in conversation.notes] == ["image_without_placeholder"]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_of_the_row_is_the_first_message(key: str) -> None:
    row = {key: "Answer as a pirate.", "conversations": turns("Who?", "Arr.")}
    system = {"role": "system", "content": [{"type": "text", "text": "Answer as a pirate."}]}
    assert parse_row(row, "0").messages[0] == system
    said_twice = {**row, "conversations": [{"from": "system", "value": row[key]}, *turns("Who?", "Arr.")]}
    assert [message["role"] for message in parse_row(said_twice, "0").messages] == ["system", "user", "assistant"]
    assert rejected({**said_twice, key: "Answer as a cook."}) == "system_twice"
    assert rejected({**row, key: 7}) == "text_missing"


@pytest.mark.parametrize("mark", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}])
def test_an_answer_that_is_not_to_be_learnt_says_so(mark: dict[str, Any]) -> None:
    row = {"conversations": turns("1+1?", "3", "Sure?", "2")}
    row["conversations"][1] |= mark
    row["conversations"][3] |= {"loss": True, "weight": 1}
    messages = parse_row(row, "0").messages
    assert [message.get("supervised") for message in messages] == [None, False, None, None]
    row["conversations"][3] = {"from": "gpt", "value": "2", **mark}
    assert rejected(row) == "nothing_to_learn"


def test_what_cannot_be_learnt_by_half_is_refused_and_marks_of_questions_are_named() -> None:
    row = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2", "weight": 0.5}]}
    assert rejected(row) == "turn_weight_unsupported"
    row = {"conversations": [{"from": "human", "value": "1?", "loss": True}, {"from": "gpt", "value": "2"}]}
    assert parse_row(row, "0").notes == [("field_ignored", "turn.loss")]


def test_reasoning_is_kept_for_the_template() -> None:
    answer = {"role": "assistant", "content": "2", "reasoning_content": "one and one"}
    row = {"messages": [{"role": "user", "content": "1+1?"}, answer]}
    assert parse_row(row, "0").messages[1]["reasoning_content"] == "one and one"
    assert rejected({"messages": [row["messages"][0], {**answer, "reasoning_content": ["a"]}]}) == "text_missing"
    assert rejected({"messages": [row["messages"][0], {**answer, "reasoning_content": "\ud83d"}]}) == "not_unicode"


def test_the_index_of_an_image_part_says_which_image_it_is() -> None:
    def row(*indices: int | None, images: int = 2) -> dict[str, Any]:
        shown = [{"type": "image", "index": index, "text": None} for index in indices]
        question = {"role": "user", "content": [*shown, {"type": "text", "text": "Which?", "index": None}]}
        names = ["a.png", "b.png", "c.png"][:images]
        return {"images": names, "messages": [question, {"role": "assistant", "content": "b"}]}

    assert parse_row(row(1, 0), "0").images == ["b.png", "a.png"]
    assert parse_row(row(1, 0, 1), "0").images == ["b.png", "a.png", "b.png"]
    assert parse_row(row(None, None), "0").images == ["a.png", "b.png"]
    assert {"type": "image"} in parse_row(row(1, 0), "0").messages[0]["content"]
    for wrong in (row(0, 2), row(0), row(0, None), row(0, 1, images=3)):
        assert rejected(wrong) == "placeholders_do_not_match"
    assert rejected(row(-1, 0)) == "image_reference_invalid"


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios", "objects", "bbox"])
def test_what_would_change_the_meaning_is_refused_by_name(key: str) -> None:
    row = {"conversations": turns("What?", "That.")}
    with pytest.raises(RecordError, match=f"^{key}: ") as caught:
        parse_row({**row, key: ["x"]}, "0")
    assert caught.value.kind == "field_unsupported"
    for empty in (None, "", [], {}):
        assert parse_row({**row, key: empty}, "0").notes == []


def test_keys_that_nothing_reads_are_named() -> None:
    row = {
        "id": "1",
        "image": "a.png",
        "images": ["b.png"],
        "model": "",
        "split": None,
        "score": 3,
        "conversations": [{"from": "human", "value": "<image>x"}, {"from": "gpt", "value": "y", "tool_calls": [{}]}],
        "messages": [{"role": "user", "content": "z"}],
    }
    notes = parse_row(row, "0").notes
    assert sorted(text for _, text in notes) == ["images", "messages", "score", "turn.tool_calls"]
    assert {kind for kind, _ in notes} == {"field_ignored"}
    assert parse_row(row, "0").images == ["a.png"]


def test_an_empty_spelling_does_not_hide_a_filled_one() -> None:
    """Tables that were joined have "" or [] in the columns that a row does not use."""
    turns = [{"from": "", "role": "user", "value": "", "content": "<image>x"}, {"from": "gpt", "value": "y"}]
    row = {"image": "", "images": ["b.png"], "system": "", "system_prompt": "Hm.", "conversations": []}
    expected = {"image": "b.png", "system": "Hm.", "messages": [{**turns[0], "from": None, "value": None}, turns[1]]}
    assert parse_row({**row, "messages": turns}, "0") == parse_row(expected, "0")
    pairs = [{"user": "<image>x", "assistant": "y"}]
    assert parse_row({**row, "messages": [], "texts": pairs}, "0") == parse_row(expected, "0")


def test_the_cauldron() -> None:
    pairs = [{"user": "Which colour?", "assistant": "Red.", "source": "VQA"}, {"user": "Sure?", "assistant": "Yes."}]
    conversation = parse_row({"images": [{"bytes": b"png", "path": None}], "texts": pairs}, "0")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[0]["content"] == parts("<image>\nWhich colour?")
    assert conversation.images == [b"png"]
    assert ("field_ignored", "texts.source") in conversation.notes


def test_openai_image_parts_and_data_urls() -> None:
    encoded = base64.b64encode(b"a picture").decode()
    url = f"data:image/png;base64,{encoded}"
    shown = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "file:///data/b%20c.png"},
        {"type": "image", "base64": encoded},
    ]
    question = {"role": "user", "content": [{"type": "text", "text": "Which? "}, *shown]}
    row = {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}
    conversation = parse_row(row, "0")
    assert conversation.images == [b"a picture", b"a picture", "a.png", "/data/b c.png", b"a picture"]
    assert conversation.messages[0]["content"][1:] == [{"type": "image"}] * 5
    assert parse_row({"image": url, "conversations": turns("<image>", "x")}, "0").images == [b"a picture"]
    for wrong in ("https://example.com/a.png", "data:image/png;base64,@", "data:video/mp4;base64,AAAA"):
        assert rejected({"image": wrong, "conversations": turns("<image>", "x")}) == "image_reference_invalid"


def test_turns_as_a_json_string() -> None:
    expected = parse_row({"conversations": turns("a", "b")}, "0")
    assert parse_row({"conversations": json.dumps(turns("a", "b"))}, "0") == expected
    assert rejected({"conversations": "hello"}) == "no_conversation"


def test_turns_begin_with_a_question_and_end_with_an_answer_as_in_llava() -> None:
    row = {"image": ["a.png"], "conversations": turns("<image>\na", "b")}
    expected = parse_row(row, "0")
    first = {"from": "gpt", "value": "Hello."}
    last = {"from": "human", "value": "More of <image>?"}
    longer = {"image": ["a.png", "b.png"], "conversations": [first, *row["conversations"], last]}
    found = parse_row(longer, "0")
    assert (found.messages, found.images) == (expected.messages, ["a.png"])
    assert [kind for kind, _ in found.notes] == ["first_answer_dropped", "last_question_dropped"]
    assert rejected({"conversations": [first]}) == "no_question"
    assert rejected({"conversations": [last | {"value": "a"}]}) == "last_question_unanswered"


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "model", "assistant"])
def test_roles_of_sharegpt(name: str) -> None:
    row = {"conversations": [{"from": "user", "value": "a"}, {"from": name, "value": "b"}]}
    assert parse_row(row, "0").messages[1]["role"] == "assistant"
    assert rejected({"conversations": [*row["conversations"], {"from": "tool", "value": "c"}]}) == "unknown_role"
