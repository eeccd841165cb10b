"""Ids and labels of one pass: for every template and tokenizer, labels are the answers and nothing else."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers_for_tests import TOKENIZER_KINDS, make_tokenizer

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import cut_to_length, encode_conversation, stop_token_ids
from llava_compete.language.templates import TEMPLATES
from llava_compete.parts import IGNORE_INDEX

END = {
    "llama3": "<|eot_id|>",
    "smollm": "<|im_end|>",
    "chatml": "<|im_end|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
}
# Private-use marks are ours, "▁" is how SentencePiece spells a space, and it normalises nothing else here.
_CHARACTERS = st.characters(exclude_categories=("Cs", "Co"), exclude_characters="▁")
_TRICKY = st.sampled_from(
    ["<image>", "</s>", "<s>", "<|im_end|>", "<eos>", "<|im_start|>assistant\n", "[INST]", "<end_of_turn>",
     "ASSISTANT:", "  ", "\n\n", " lead", "trail ", "é", "日本",
     "👩‍👩‍👧", "<|end|>\n<|user|>", "<<image>>", "<|eot_id|>", "<pad>"]
)  # fmt: skip
TEXT = st.lists(st.one_of(_TRICKY, st.text(_CHARACTERS, max_size=8)), min_size=1, max_size=4).map("".join)
FILLED = TEXT.filter(bool)


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


def labelled_runs(encoded):
    """Maximal runs of labelled ids, cut at the ends of turns, with the position of each."""
    runs, start = [], 0
    for end in encoded.turn_ends:
        while encoded.labels[start] == IGNORE_INDEX:
            start += 1
        runs.append((start, encoded.labels[start : end.position]))
        assert encoded.labels[start : end.position] == encoded.input_ids[start : end.position]
        start = end.position
    assert all(label == IGNORE_INDEX for label in encoded.labels[start:])
    return runs


def decode(tokenizer, ids, inside_line):
    """Decode ids; `inside_line`: they follow a line break, so that a leading space is one of the text's."""
    if not inside_line:
        return tokenizer.decode(ids)
    anchor = tokenizer.encode("x\n", add_special_tokens=False)
    return tokenizer.decode(anchor + ids)[len(tokenizer.decode(anchor)) :]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(conversation=conversations(), kind=st.sampled_from(TOKENIZER_KINDS))
def test_labels_are_the_answers_and_a_row_begins_with_its_prompt(template, kind, conversation):
    messages, answers = conversation
    tokenizer = make_tokenizer(kind, template)
    encoded = encode_conversation(tokenizer, messages, tokens_per_image=5)
    end = END.get(template, tokenizer.eos_token)
    runs = labelled_runs(encoded)
    texts = [decode(tokenizer, ids, inside_line=template in END) for _, ids in runs]
    assert texts == [answer + end for answer in answers]
    # Each run holds the end token once, at its end: control strings in a text stay text.
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert all(ids.count(end_id) == 1 and ids[-1] == end_id for _, ids in runs)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(image_id) == 5 * encoded.num_images

    answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for (start, _), index in zip(runs, answered, strict=True):
        prompt = encode_conversation(tokenizer, messages[:index], tokens_per_image=5, add_generation_prompt=True)
        assert prompt.input_ids == encoded.input_ids[:start]


@settings(max_examples=100, deadline=None)
@given(conversation=conversations(), limit=st.integers(1, 120), kind=st.sampled_from(TOKENIZER_KINDS))
def test_length_limit_cuts_between_turns_and_never_in_an_image(conversation, limit, kind):
    messages, answers = conversation
    tokenizer = make_tokenizer(kind, "chatml")
    whole = encode_conversation(tokenizer, messages, tokens_per_image=7)
    cut = cut_to_length(whole, limit)
    if cut is None:
        assert whole.turn_ends[0].position > limit
        return
    assert len(cut.input_ids) <= limit
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert cut.labels == whole.labels[: len(cut.labels)]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert cut.input_ids.count(image_id) == 7 * cut.num_images
    kept = [text for text, end in zip(answers, whole.turn_ends, strict=True) if end.position <= limit]
    assert [decode(tokenizer, ids, True) for _, ids in labelled_runs(cut)] == [text + "<|im_end|>" for text in kept]


@pytest.mark.parametrize("template", TEMPLATES)
def test_plain_questions_have_the_ids_of_the_tokenizers_own_chat_template_call(template):
    """For text without control strings and one turn, nothing differs from `apply_chat_template`."""
    messages = [{"role": "user", "content": "What color is the circle?"}]
    for kind in TOKENIZER_KINDS:
        tokenizer = make_tokenizer(kind, template)
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_conversation(tokenizer, messages, add_generation_prompt=True).input_ids == theirs, kind


def test_a_control_token_that_takes_white_space_does_so_after_an_answer_too():
    """Phi-3's tokens strip the line break behind them: several turns have the ids of the whole text."""
    tokenizer = copy.deepcopy(make_tokenizer("byte_bpe", "phi3"))
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, rstrip=True) for name in names], special_tokens=True)
    turns = [("color?", "red"), ("the circle?", "a circle")]
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode_conversation(tokenizer, messages).input_ids == whole
    assert "\n" not in tokenizer.decode(whole)

    messages[1]["content"] = " red"  # an answer's own space is learnt, whatever the token before it takes
    encoded = encode_conversation(tokenizer, messages)
    assert tokenizer.decode(labelled_runs(encoded)[0][1]) == " red<|end|>"


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
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
        with pytest.raises(UserError, match="roles must alternate"):
            encode_conversation(tokenizer, [{"role": "user", "content": "a"}])
    finally:
        tokenizer.chat_template = original
