"""Generation: batched equals one by one, several images or none, beams, sampling, streaming, assistance, no cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model
from transformers import AutoTokenizer, CompileConfig, TextIteratorStreamer

from llava_compete.errors import UserError
from llava_compete.model.build import load_checkpoint, save_checkpoint

MOE = {"vision": {}, "projector": {}, "language": {}}
PROMPTS = ["a <image> red circle is there", "how many", "<image> and <image> which"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}


@pytest.fixture(scope="module", params=[None, MOE], ids=["dense", "moe"])
def pair(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model, processor = tiny_model(moe=request.param, seed=3)
    return model.eval(), processor


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(1)
    arrays = torch.randint(0, 256, (3, 40, 30, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


def answers(pair: Any, prompts: list[str], images: list[Image.Image], **options: Any) -> torch.Tensor:
    model, processor = pair
    inputs = processor(text=prompts, images=images or None, return_tensors="pt", padding=True)
    output = model.generate(**inputs, **{**GREEDY, **options})
    return output[:, inputs["input_ids"].shape[1] :]


def test_batched_equals_one_by_one(pair: Any) -> None:
    batched = answers(pair, PROMPTS, pictures())
    first, second, third = pictures()
    for row, (prompt, images) in enumerate(zip(PROMPTS, ([first], [], [second, third]), strict=True)):
        assert torch.equal(answers(pair, [prompt], images)[0], batched[row])


def test_cache_changes_nothing(pair: Any) -> None:
    expected = answers(pair, PROMPTS, pictures())
    assert torch.equal(answers(pair, PROMPTS, pictures(), use_cache=False), expected)
    static = answers(pair, PROMPTS, pictures(), cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


def test_generate_is_repeated_forward(pair: Any) -> None:
    model, processor = pair
    inputs = processor(text=PROMPTS[2:], images=pictures()[1:], return_tensors="pt")
    ids = inputs["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids[:, -4:], answers(pair, PROMPTS[2:], pictures()[1:], max_new_tokens=4))


def test_beams_keep_each_rows_images(pair: Any) -> None:
    together = answers(pair, PROMPTS, pictures(), num_beams=3, length_penalty=0.0)
    alone = answers(pair, PROMPTS[2:], pictures()[1:], num_beams=3, length_penalty=0.0)
    assert torch.equal(together[2], alone[0])


def test_samples_return_sequences_and_streaming(pair: Any) -> None:
    _, processor = pair
    torch.manual_seed(0)
    assert answers(pair, PROMPTS, pictures(), do_sample=True, num_return_sequences=2).shape == (6, 8)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    ids = answers(pair, PROMPTS[:1], pictures()[:1], streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(ids[0])


@pytest.mark.parametrize("assistant", ["prompt-lookup", "text-only-model", "vision-model"])
def test_assisted_generation_equals_greedy(pair: Any, assistant: str) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if assistant != "prompt-lookup":
        helper, _ = tiny_model(seed=4, **({"tower": None} if assistant == "text-only-model" else {}))
        options = {"assistant_model": helper.eval()}
    expected = answers(pair, PROMPTS[:1], pictures()[:1])
    assert torch.equal(answers(pair, PROMPTS[:1], pictures()[:1], **options), expected)


def test_never_writes_a_placeholder(pair: Any) -> None:
    model, _ = pair
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        before = head.clone()
        head[model.config.image_token_id] = 1000 * head.mean(0).sign()
        assert model.config.image_token_id not in answers(pair, PROMPTS, pictures())
        head.copy_(before)


def test_chat_template_of_the_checkpoint(pair: Any, tmp_path: Any) -> None:
    pair[1](text=["pad", "to the right"], padding=True, padding_side="right")  # leaves no trace in what is saved
    save_checkpoint(*pair, tmp_path)
    model, processor = load_checkpoint(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many shapes ?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=pictures()[:1], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.num_image_tokens
    assert processor.tokenizer.padding_side == AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id


def test_a_literal_placeholder_in_a_text_is_text(pair: Any) -> None:
    model, processor = pair
    content = [{"type": "image", "image": pictures()[0]}, {"type": "text", "text": "what is <image> or <|im_end|> ?"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    two = [[{"role": "user", "content": content}], [{"role": "user", "content": "hi"}]]
    inputs = processor.apply_chat_template(two, **options)
    places = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert places.tolist() == [model.config.num_image_tokens, 0]
    assert inputs["attention_mask"][1, 0] == 0  # left padding
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    alone = processor.apply_chat_template(two[0], **options)
    assert torch.equal(alone["input_ids"], inputs["input_ids"][:1])
    with pytest.raises(UserError, match="gives no image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], **options)


@pytest.mark.slow
def test_a_static_cache_changes_nothing_and_its_steps_compile_as_one_graph(pair: Any) -> None:
    """What `generate(cache_implementation="static")` does on a GPU, where the graph is replayed without launches."""
    expected = answers(pair, PROMPTS[:1], pictures()[:1])
    static = {"cache_implementation": "static"}
    assert torch.equal(answers(pair, PROMPTS[:1], pictures()[:1], **static, disable_compile=True), expected)
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    compiled = answers(pair, PROMPTS[:1], pictures()[:1], **static, compile_config=settings)
    assert torch.equal(compiled, expected)
