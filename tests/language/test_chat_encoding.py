"""Ids and labels of one pass: for every template and tokenizer, labels are the answers and nothing else."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_for_tests import TOKENIZER_KINDS, make_tokenizer

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import (
    IGNORE_INDEX,
    cut_to_length,
    encode_answer,
    encode_conversation,
    images_before,
    on_lines_of_their_own,
    stop_token_ids,
)
from llava_compete.language.templates import TEMPLATES

END = {
    "llama3": "<|eot_id|>",
    "smollm2": "<|im_end|>",
    "smollm3": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "chatml": "<|im_end|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
}
# What a published template does to the white space around an answer.
STRIPS = {
    "gemma": str.strip,
    "smollm3": lambda text: text.lstrip("\n"),
    "mistral_v3": lambda text: text.rstrip(" "),
    "mistral_tekken": lambda text: text.rstrip(" "),
}
# These write the last turn otherwise than the ones before it (an empty think block; the system prompt).
LAST_TURN_DIFFERS = ("qwen3", "mistral_v3", "mistral_tekken")
# These noncharacters are our marks, "▁" is how SentencePiece spells a space, and it normalises nothing else here.
_CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="▁\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4")
_TRICKY = st.sampled_from(
    ["<image>", "</s>", "<s>", "<|im_end|>", "<eos>", "<|im_start|>assistant\n", "[INST]", "<end_of_turn>",
     "ASSISTANT:", "  ", "\n\n", " lead", "trail ", "é", "日本",
     "👩‍👩‍👧", "\uf8f0 \uf8f4x", "<|end|>\n<|user|>", "<<image>>", "<|eot_id|>", "<pad>"]
)  # fmt: skip
TEXT = st.lists(st.one_of(_TRICKY, st.text(_CHARACTERS, max_size=8)), min_size=1, max_size=4).map("".join)
# Hypothesis also tries strings of our source, and what stands before this one is no answer but reasoning.
FILLED = TEXT.filter(lambda text: text and "</think>" not in text)


@st.composite
def conversations(draw):
    """(messages, answers): an optional system turn (maybe empty), one to three turns, images in the user's turns."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(st.one_of(st.just(""), TEXT))})
    answers = []
    for _ in range(draw(st.integers(1, 3))):
        content = [{"type": "text", "text": draw(TEXT)}]
        content[draw(st.integers(0, 1)) : 0] = [{"type": "image"}] * draw(st.integers(0, 2))
        answers.append(draw(FILLED))
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answers[-1]}]
    return messages, answers


def learnt_runs(encoded):
    """Start and ids of each answer; checks that the labels are these and nothing else."""
    labels = [IGNORE_INDEX] * len(encoded.labels)
    for answer in encoded.answers:
        labels[answer.start : answer.end] = encoded.input_ids[answer.start : answer.end]
    assert encoded.labels == labels
    return [(answer.start, encoded.input_ids[answer.start : answer.end]) for answer in encoded.answers]


def decode(tokenizer, ids, inside_line):
    """Decode ids; `inside_line`: they follow a line break, so that a leading space is one of the text's."""
    if not inside_line:
        return tokenizer.decode(ids)
    anchor = tokenizer.encode("x\n", add_special_tokens=False)
    return tokenizer.decode(anchor + ids)[len(tokenizer.decode(anchor)) :]


def written(template, answers):
    """The answers as the template writes them, white space before one left out."""
    strip = STRIPS.get(template, str)
    texts = [strip(answer) for answer in answers]
    if template == "qwen3":
        texts[-1] = texts[-1].lstrip("\n")
    if template == "llava_llama_2":
        texts = [f"{text} ".lstrip(" ") for text in texts]
    return texts


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=30, deadline=None)
@given(conversation=conversations(), kind=st.sampled_from(TOKENIZER_KINDS))
def test_labels_are_the_answers_and_a_row_begins_with_its_prompt(template, kind, conversation):
    messages, answers = conversation
    tokenizer = make_tokenizer(kind, template)
    encoded = encode_conversation(tokenizer, messages, tokens_per_image=5)
    end = END.get(template, tokenizer.eos_token)
    runs = learnt_runs(encoded)
    texts = [decode(tokenizer, ids, inside_line=template in END) for _, ids in runs]
    if template not in END:
        # Whether the space that begins an answer is decoded is a matter of SentencePiece's decoder.
        texts = [text.lstrip(" ") for text in texts]
        answers = [answer.lstrip(" ") for answer in answers]
    assert texts == [text + end for text in written(template, answers)]
    # Each run holds the end token once, at its end: control strings in a text stay text.
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert all(ids.count(end_id) == 1 and ids[-1] == end_id for _, ids in runs)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(image_id) == 5 * encoded.num_images

    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for (start, _), index in zip(runs, answered, strict=True):
        if template not in LAST_TURN_DIFFERS or index == answered[-1]:
            prompt = encode_conversation(tokenizer, messages[:index], tokens_per_image=5, add_generation_prompt=True)
            assert prompt.input_ids == encoded.input_ids[:start]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=15, deadline=None)
@given(conversation=conversations(), kind=st.sampled_from(TOKENIZER_KINDS))
def test_a_scored_answer_has_the_ids_that_training_teaches(template, kind, conversation):
    messages, answers = conversation
    tokenizer = make_tokenizer(kind, template)
    encoded = encode_conversation(tokenizer, messages, tokens_per_image=5)
    prompt, ids = encode_answer(tokenizer, messages[:-1], answers[-1], tokens_per_image=5)
    last = encoded.answers[-1]
    assert prompt == encoded.input_ids[: last.start]
    assert ids == encoded.labels[last.start : last.answer_end]
    assert tokenizer.convert_tokens_to_ids(END.get(template, tokenizer.eos_token)) not in ids


@settings(max_examples=100, deadline=None)
@given(conversation=conversations(), limit=st.integers(1, 160), template=st.sampled_from(["chatml", "qwen3"]))
def test_length_limit_cuts_between_turns_and_never_in_an_image(conversation, limit, template):
    messages, _ = conversation
    tokenizer = make_tokenizer("byte_bpe", template)
    whole = encode_conversation(tokenizer, messages, tokens_per_image=7)
    cut = cut_to_length(tokenizer, messages, whole, limit, tokens_per_image=7)
    turns = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    shorter = [encode_conversation(tokenizer, messages[:turn], tokens_per_image=7) for turn in turns]
    fitting = [row for row in shorter if row.answers[-1].end <= limit]
    if cut is None:
        assert not fitting
        return
    # The conversation that is cut is the conversation that had ended there, but for what follows its last answer.
    assert len(cut.input_ids) <= limit
    assert cut.answers == fitting[-1].answers
    assert cut.input_ids == fitting[-1].input_ids[: len(cut.input_ids)]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert cut.input_ids.count(image_id) == 7 * cut.num_images


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_has_the_ids_of_the_tokenizers_own_chat_template_call(template, kind):
    """For text without control strings nothing differs from `apply_chat_template`, with white space and turns."""
    tokenizer = make_tokenizer(kind, template)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What color  is\n\nthe circle?\n"},
        {"role": "assistant", "content": "the red"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "a  circle"},
    ]
    for number in (2, 4):
        theirs = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
        assert encode_conversation(tokenizer, messages[:number], add_generation_prompt=True).input_ids == theirs
    for number in (3, 5):
        theirs = tokenizer.apply_chat_template(messages[:number], return_dict=False)
        assert encode_conversation(tokenizer, messages[:number]).input_ids == theirs
    del messages[0]
    theirs = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode_conversation(tokenizer, messages).input_ids == theirs


def test_phi3s_control_tokens_take_the_white_space_behind_them():
    """Published ids of "<|assistant|>\\nthe": the control token, then "▁the": never "the", nor a line break."""
    tokenizer = copy.deepcopy(make_tokenizer("legacy_llama", "phi3"))
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokens = [AddedToken(name, special=True, rstrip=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    messages = [
        {"role": "user", "content": "\n color red"},
        {"role": "assistant", "content": "the"},
        {"role": "user", "content": "color"},
        {"role": "assistant", "content": " red"},
    ]
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    expected = ["<|user|>", "▁color", "▁red", "<|end|>", "<|assistant|>", "▁the", "<|end|>"]
    expected += ["<|user|>", "▁color", "<|end|>", "<|assistant|>", "▁red", "<|end|>"]
    assert encoded.input_ids == tokenizer.convert_tokens_to_ids(expected)
    assert [ids for _, ids in learnt_runs(encoded)] == [
        tokenizer.convert_tokens_to_ids(["▁the", "<|end|>"]),
        tokenizer.convert_tokens_to_ids(["▁red", "<|end|>"]),
    ]
    _, choice = encode_answer(tokenizer, messages[:1], "the")
    assert choice == tokenizer.convert_tokens_to_ids(["▁the"])


def test_no_space_is_written_behind_a_control_token_where_the_tokenizer_writes_none():
    """Vicuna's later turns: "USER" follows "</s>" directly (`legacy: false`), or with a space (older files)."""
    messages = [{"role": role, "content": "red"} for role in ("user", "assistant", "user", "assistant")]
    for kind, first in (("unigram", "U"), ("legacy_llama", "▁")):
        tokenizer = make_tokenizer(kind, "vicuna_v1")
        encoded = encode_conversation(tokenizer, messages)
        (after_answer,) = (answer.end for answer in encoded.answers[:1])
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids[after_answer]) == first
        assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_text_keeps_its_white_space_around_an_image():
    tokenizer = make_tokenizer("byte_bpe", "chatml")
    image = {"type": "image"}
    content = [{"type": "text", "text": "Describe.\n"}, image, {"type": "text", "text": " or "}, image]
    encoded = encode_conversation(tokenizer, [{"role": "user", "content": content}], tokens_per_image=1)
    assert "user\nDescribe.\n<image> or <image><|im_end|>" in tokenizer.decode(encoded.input_ids)

    # As LLaVA puts images that have no place of their own, also where a message's parts are given one by one.
    text = {"type": "text", "text": "Describe."}
    assert images_before(2, [text]) == on_lines_of_their_own([image, image, text])
    encoded = encode_conversation(
        tokenizer, [{"role": "user", "content": images_before(2, [text])}], tokens_per_image=1
    )
    assert "user\n<image>\n<image>\nDescribe.<|im_end|>" in tokenizer.decode(encoded.input_ids)
    assert images_before(1, []) == on_lines_of_their_own([image]) == [image]
    assert on_lines_of_their_own([text, image, text]) == [text, image, text]
    spaced = [image, {"type": "text", "text": " and"}]
    assert on_lines_of_their_own(spaced) == spaced


def test_an_answer_that_is_not_supervised_is_not_learnt():
    tokenizer = make_tokenizer("byte_bpe", "chatml")
    messages = [{"role": role, "content": "red"} for role in ("user", "assistant", "user", "assistant")]
    messages[1]["supervised"] = False
    encoded = encode_conversation(tokenizer, messages)
    first, second = encoded.answers
    assert set(encoded.labels[: second.start]) == {IGNORE_INDEX}
    assert encoded.labels[second.start : second.end] == encoded.input_ids[second.start : second.end]
    assert first.end < second.start


@pytest.mark.parametrize("template", TEMPLATES)
def test_stop_tokens(template):
    tokenizer = make_tokenizer("byte_bpe", template)
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END.get(template, "<eos>"))}
    assert set(stop_token_ids(tokenizer)) == expected


def test_a_template_that_drops_an_image_is_refused():
    tokenizer = make_tokenizer("byte_bpe", "chatml")
    messages = [
        {"role": "user", "content": "Look:"},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    with pytest.raises(UserError, match="writes 0 image tokens"):
        encode_conversation(tokenizer, messages, tokens_per_image=4)


def test_a_template_that_raises_is_a_user_error():
    tokenizer = make_tokenizer("byte_bpe", "chatml")
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UserError, match="roles must alternate"):
            encode_conversation(tokenizer, [{"role": "user", "content": "a"}])
    finally:
        tokenizer.chat_template = original
