"""The processor's chat call: ids as in training, whichever chat template the tokenizer has."""

import logging
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model

from llava_compete.data.records import parse_row
from llava_compete.language.chat_encoding import encode_conversation

# A language model's own template, which takes texts alone.
TEXTS_ALONE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
PICTURE = Image.new("RGB", (28, 28), (200, 10, 10))


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_model()[1]


def ask(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


DATED = "{{- '<|im_start|>system\n' + strftime_now('%d %B %Y') + '<|im_end|>\n' -}}" + TEXTS_ALONE


@pytest.mark.parametrize("own", [None, TEXTS_ALONE, DATED], ids=["ours", "texts alone", "dated"])
def test_a_question_has_the_ids_of_a_training_row(processor: Any, own: str | None) -> None:
    kept = processor.tokenizer.chat_template
    try:
        processor.tokenizer.chat_template = processor.chat_template = own or kept
        messages = ask({"type": "image", "image": PICTURE}, {"type": "text", "text": "what colour ?"})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        turns = [{"from": "human", "value": "<image>\nwhat colour ?"}, {"from": "gpt", "value": "red"}]
        row = parse_row({"id": "0", "image": "a.png", "conversations": turns}, "0")
        images = processor.num_image_tokens
        encoded = encode_conversation(processor.tokenizer, row.messages, tokens_per_image=images)
        assert inputs["input_ids"].tolist() == [encoded.input_ids[: encoded.answers[0].start]]
        assert inputs["pixel_values"].shape == (1, 3, 28, 28)

        # The same as text, and from text with the picture beside it.
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        before = "<|im_start|>system\n26 July 2024<|im_end|>\n" if own == DATED else ""
        assert text == before + "<|im_start|>user\n<image>\nwhat colour ?<|im_end|>\n<|im_start|>assistant\n"
        from_text = processor(images=[PICTURE], text=text, return_tensors="pt")
        assert torch.equal(from_text["input_ids"], inputs["input_ids"])
    finally:
        processor.tokenizer.chat_template = processor.chat_template = kept


def test_a_conversation_as_text_warns_of_nothing(
    processor: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text = processor.apply_chat_template([{"role": "user", "content": "what ?"}], add_generation_prompt=True)
    assert "what ?" in text
    assert not caplog.records


def test_a_batch_of_conversations_is_padded_on_the_left(processor: Any) -> None:
    short, long = ask({"type": "text", "text": "what ?"}), ask({"type": "text", "text": "how many shapes are there ?"})
    inputs = processor.apply_chat_template(
        [short, long], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    texts = processor.apply_chat_template([short, long], add_generation_prompt=True)
    assert [text.count("<|im_start|>") for text in texts] == [2, 2]
