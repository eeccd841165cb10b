"""Each template against the text that its authors publish, and which template a tokenizer gets."""

import copy
import logging

import pytest
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig

from llava_compete.errors import UserError
from llava_compete.language.chat_encoding import encode_conversation, stop_token_ids
from llava_compete.language.config import LanguageModelSection
from llava_compete.language.sources import load_tokenizer
from llava_compete.language.templates import TEMPLATES, choose_chat_template, read_template, set_chat_template

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TURNS = (
    "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
)
# Q1, A1, Q2, A2 without a system turn. Sources: llama-models 0.3.0, ChatFormat; the chat templates in the tokenizers of
# Qwen2.5, Qwen3, SmolLM2 and Gemma 3; mistral-common 1.13.1, `Tokenized.text`; Phi-3-mini's model card; LLaVA's
# conversation.py.
PUBLISHED = {
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "chatml": TURNS,
    "qwen2_5": QWEN + TURNS,
    "qwen3": TURNS.replace("A2", "<think>\n\n</think>\n\nA2"),
    "smollm2": SMOLLM2 + TURNS,
    "phi3": "<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
    "gemma": "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    "mistral_v1": "<s> [INST] Q1 [/INST] A1</s> [INST] Q2 [/INST] A2</s>",
    "mistral_v3": "<s>[INST] Q1[/INST] A1</s>[INST] Q2[/INST] A2</s>",
    "mistral_tekken": "<s>[INST]Q1[/INST]A1</s>[INST]Q2[/INST]A2</s>",
    "vicuna_v1": f"<s>{VICUNA}USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llava_llama_2": f"<s>[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
}
# What differs with a system turn "S".
WITH_SYSTEM = {
    "llama3": ("<s>", "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"),
    "qwen2_5": (QWEN, "<|im_start|>system\nS<|im_end|>\n"),
    "smollm2": (SMOLLM2, "<|im_start|>system\nS<|im_end|>\n"),
    "gemma": ("Q1", "S\n\nQ1"),
    "mistral_v1": ("Q1", "S\n\nQ1"),
    "mistral_v3": ("Q2", "S\n\nQ2"),
    "mistral_tekken": ("Q2", "S\n\nQ2"),
    "vicuna_v1": (VICUNA, "S "),
    "llava_llama_2": (LLAVA_LLAMA_2, "S"),
}
CONVERSATION = [
    {"role": role, "content": text}
    for role, text in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
]
SYSTEM = {"role": "system", "content": "S"}


def own_copy(template):
    return copy.deepcopy(make_tokenizer("unigram", template))


@pytest.mark.parametrize("template", PUBLISHED)
def test_the_text_is_the_published_one(template):
    tokenizer = make_tokenizer("unigram", template)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == PUBLISHED[template]
    if template in WITH_SYSTEM:
        found = tokenizer.apply_chat_template([SYSTEM, *CONVERSATION], tokenize=False)
        assert found == PUBLISHED[template].replace(*WITH_SYSTEM[template], 1)
    parts = [{"type": "image"}, {"type": "text", "text": "\nQ1"}]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "<image>\nQ1" in shown


def test_the_generation_prompt_of_a_reasoning_model_has_an_empty_thought():
    tokenizer = make_tokenizer("unigram", "qwen3")
    ids = encode_conversation(tokenizer, CONVERSATION[:1], add_generation_prompt=True).input_ids
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")
    ids = encode_conversation(tokenizer, CONVERSATION[:1], add_generation_prompt=True, thinking=True).input_ids
    assert tokenizer.decode(ids).endswith("assistant\n")

    # A thought that the row holds is learnt with the answer, from "<think>" on.
    for answer in (
        {"role": "assistant", "content": "A1", "reasoning_content": "R"},
        {"role": "assistant", "content": "<think>\nR\n</think>\n\nA1"},
    ):
        encoded = encode_conversation(tokenizer, [CONVERSATION[0], answer])
        (span,) = encoded.answers
        assert tokenizer.decode(encoded.input_ids[: span.start]).endswith("assistant\n")
        assert tokenizer.decode(encoded.labels[span.start : span.end]) == "<think>\nR\n</think>\n\nA1<|im_end|>"
        assert tokenizer.convert_tokens_to_ids("<think>") in encoded.labels


THOUGHT = "<think>\nR\n</think>\n\nA1"


@pytest.mark.parametrize("template", ["chatml", "llama3", "vicuna_v1", "gemma", "phi3", "mistral_v3", "smollm3"])
def test_a_template_without_thoughts_leaves_one_in_an_answers_text(template):
    tokenizer = make_tokenizer("byte_bpe_bos", template)
    encoded = encode_conversation(tokenizer, [CONVERSATION[0], {"role": "assistant", "content": THOUGHT}])
    (span,) = encoded.answers
    assert tokenizer.decode(encoded.labels[span.start : span.answer_end]).strip() == THOUGHT


def test_a_template_that_drops_thoughts_drops_those_in_an_answers_text():
    """As DeepSeek-R1's does, by which a mark before the thought would be lost too."""
    tokenizer = make_tokenizer("byte_bpe_bos", "chatml")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoded = encode_conversation(tokenizer, [CONVERSATION[0], {"role": "assistant", "content": THOUGHT}])
    (span,) = encoded.answers
    assert tokenizer.decode(encoded.labels[span.start : span.end]) == "A1<|im_end|>"
    assert choose_chat_template(tokenizer, "llama") == 0
    # R1's prompt also opens a thought, which no row then has.
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    with pytest.raises(UserError, match=r"its prompt for an answer ends with .*<think>.* set `chat_template`"):
        choose_chat_template(tokenizer, "llama")


# As Llama 3.2's: a date that the caller gives, else today's.
LLAMA_3_2 = (
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}{%- set date_string = '26 Jul 2024' -%}"
    "{%- endif -%}{%- endif -%}{{- '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' -}}"
)


# As gpt-oss's: in a macro, and with white space in front that is the template's own.
IN_A_MACRO = "  {%- macro head() -%}Today Date: {{ strftime_now('%Y-%m-%d') }}\n{% endmacro %}{{ head() }}"


@pytest.mark.parametrize(
    ("before", "date"), [("", "26 July 2024"), (LLAMA_3_2, "26 Jul 2024"), (IN_A_MACRO, "2024-07-26")]
)
def test_no_row_or_prompt_has_another_date_tomorrow(before, date):
    """Also where transformers or a server renders the checkpoint's template."""
    tokenizer = own_copy("smollm3" if not before else "chatml")
    tokenizer.chat_template = before + tokenizer.chat_template
    assert choose_chat_template(tokenizer, "llama") == 0
    assert f"Today Date: {date}" in tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    row = encode_conversation(tokenizer, CONVERSATION)
    prompt = encode_conversation(tokenizer, CONVERSATION[:1], add_generation_prompt=True)
    for encoded in (row, prompt):
        assert f"Today Date: {date}" in tokenizer.decode(encoded.input_ids)


def test_the_date_in_smollm3s_system_turn_does_not_change_what_is_learnt():
    tokenizer = make_tokenizer("unigram", "smollm3")
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert text.startswith("<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ")
    assert "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are a helpful AI assistant named SmolLM" in text
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\nA") == 2
    encoded = encode_conversation(tokenizer, CONVERSATION)
    learnt = [tokenizer.decode(encoded.input_ids[answer.start : answer.end]) for answer in encoded.answers]
    assert learnt == ["A1<|im_end|>", "A2<|im_end|>"]


# A template as SmolLM3's: its own marks cover the header too and the line break behind the turn.
WIDE_MARKS = (
    "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{% generation %}"
    "{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}{% endgeneration %}{%- else -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
NO_MARKS = WIDE_MARKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
STRIPPING = NO_MARKS.replace("message.content", "(message.content | trim)")


@pytest.mark.parametrize("own", [WIDE_MARKS, NO_MARKS], ids=["wide marks", "no marks"])
def test_a_tokenizers_own_template_is_kept_whatever_the_models_family(own):
    tokenizer = own_copy("chatml")
    expected = encode_conversation(tokenizer, CONVERSATION)
    tokenizer.chat_template = own
    assert choose_chat_template(tokenizer, "llama") == 0
    assert tokenizer.chat_template == own
    assert encode_conversation(tokenizer, CONVERSATION) == expected
    assert stop_token_ids(tokenizer) == stop_token_ids(make_tokenizer("unigram", "chatml"))
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ1"}]}, *CONVERSATION[1:]]
    assert encode_conversation(tokenizer, image, tokens_per_image=3).num_images == 1


def test_answers_are_found_in_a_template_that_strips_them():
    tokenizer = own_copy("chatml")
    tokenizer.chat_template = STRIPPING
    messages = [{**message, "content": f" \n{message['content']} \n"} for message in CONVERSATION]
    encoded = encode_conversation(tokenizer, messages)
    plain = encode_conversation(tokenizer, CONVERSATION)
    assert encoded == plain
    assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_template_that_ends_no_answer_is_refused_when_it_is_chosen():
    tokenizer = own_copy("chatml")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role + ':' + message.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"own chat template cannot be trained with: .*nothing behind an answer"):
        choose_chat_template(tokenizer, "llama")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="writes 0 of 1 answers"):
        choose_chat_template(tokenizer, "llama")


@pytest.mark.parametrize(
    ("model_type", "template"),
    [
        ("llama", "chatml"),  # not SmolLM's: its system turn would be put before every row
        ("qwen2", "qwen2_5"),
        ("qwen3", "qwen3"),
        ("smollm3", "smollm3"),
        ("mistral", "mistral_tekken"),
        ("mistral", "mistral_v3"),
        ("mistral", "mistral_v1"),
        ("llama", "llama3"),
        ("llama", "vicuna_v1"),
        ("phi3", "phi3"),
        ("gemma3_text", "gemma"),
    ],
)
def test_the_family_is_a_fallback_told_apart_by_control_tokens(model_type, template, caplog):
    tokenizer = own_copy(template)
    tokenizer.chat_template = None
    with caplog.at_level(logging.WARNING, logger="llava_compete"):
        assert choose_chat_template(tokenizer, model_type) == 0
    assert f"no chat template: using '{template}'" in caplog.text
    assert tokenizer.chat_template == read_template(template)


def test_every_template_has_marks_for_other_trainers():
    for name in TEMPLATES:
        tokenizer = own_copy(name)
        set_chat_template(tokenizer, name)
        theirs = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
        ours = encode_conversation(tokenizer, CONVERSATION)
        assert theirs["input_ids"] == ours.input_ids
        learnt = [index for index, label in enumerate(ours.labels) if label != -100]
        if name != "plain":
            assert [index for index, mask in enumerate(theirs["assistant_masks"]) if mask] == learnt


def test_a_tokenizer_without_end_and_pad_pads_with_the_end_of_a_turn():
    tokenizer = copy.deepcopy(make_tokenizer("byte_bpe", "chatml"))
    tokenizer.pad_token = tokenizer.eos_token = None
    loaded = load_tokenizer(LanguageModelSection(name="x"), None, LlamaConfig(), trained=tokenizer)
    assert (loaded.eos_token, loaded.pad_token) == (None, "<|im_end|>")
