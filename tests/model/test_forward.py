"""The whole forward: image features in their places, losses that add up, text-only parity, packing, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llava_compete.errors import UserError
from llava_compete.model.losses import language_loss
from llava_compete.moe.config import MoeConfig
from llava_compete.parts import PREFIXES

MOE = {"vision": {}, "projector": {}, "language": {}}
COEFS = MoeConfig.model_validate(MOE)


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def batch(processor: Any, texts: list[str], images: list[Image.Image] | None = None) -> dict[str, torch.Tensor]:
    """Model inputs with right padding and labels on all text."""
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels.masked_fill(labels == processor.image_token_id, -100)}


def test_features_stand_where_the_placeholders_are() -> None:
    model, processor = tiny_model()
    model.eval()
    inputs = batch(processor, ["a <image> b", "c", "<image><image> d"], [picture(c) for c in ("red", "lime", "blue")])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    expected = embeddings.clone()
    expected[inputs["input_ids"] == model.config.image_token_id] = features.flatten(0, 1)
    by_ids = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    by_embeds = model(inputs_embeds=expected, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(by_ids, by_embeds)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 3 * model.config.num_image_tokens


def test_text_only_input_gives_the_language_models_logits() -> None:
    model, processor = tiny_model()
    plain = AutoModelForCausalLM.from_config(model.config.text_config)
    plain.base_model.load_state_dict(model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    inputs = processor(text=["how many shapes", "a"], return_tensors="pt", padding=True, padding_side="right")
    torch.testing.assert_close(model.eval()(**inputs).logits, plain.eval()(**inputs).logits, rtol=0, atol=0)


def test_language_loss_is_the_mean_over_supervised_tokens() -> None:
    model, processor = tiny_model()
    inputs = batch(processor, ["a <image> red circle", "how many ?"], [picture()])
    output = model(**inputs)
    targets = inputs["labels"][:, 1:]
    log_probs = F.log_softmax(output.logits[:, :-1].float(), -1)
    picked = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = -picked[targets != -100].mean()
    torch.testing.assert_close(output.loss, expected)
    count = int((targets != -100).sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(4 * count)).loss, expected / 4)


@pytest.mark.parametrize("competing", [frozenset(), frozenset({"vision.0", "projector.0", "language.1"})])
def test_total_is_the_language_loss_plus_each_parts_mean(competing: frozenset[str]) -> None:
    model, processor = tiny_model(moe=MOE)
    model.routing.competing = competing
    output = model(**batch(processor, ["a <image> red", "two shapes"], [picture()]))
    total = output.lm_loss
    for part, layer_config in COEFS.parts().items():
        records = {name: record for name, record in model.routing.records.items() if name.startswith(part)}
        aux = [
            sum(layer_config.loss_coefs(name in competing)[term] * value for term, value in record.losses.items())
            for name, record in records.items()
        ]
        torch.testing.assert_close(output.aux_losses[part], torch.stack(aux).mean())
        total = total + torch.stack(aux).mean()
        # The paper's two balance coefficients are equal, so the logged means add up too.
        coefs = layer_config.loss_coefs(False) | layer_config.loss_coefs(True)
        logged = {term.split("/")[1]: value for term, value in output.loss_terms.items() if term.startswith(part)}
        torch.testing.assert_close(sum(coefs[term] * value for term, value in logged.items()), torch.stack(aux).mean())
    torch.testing.assert_close(output.loss, total)
    assert set(output.aux_losses) == {"vision", "projector", "language"}


def test_padding_changes_neither_losses_nor_statistics() -> None:
    model, processor = tiny_model(moe=MOE)
    inputs = batch(processor, ["a <image> red", "two shapes are there"], [picture()])
    output = model(**inputs)
    longer = {
        "input_ids": F.pad(inputs["input_ids"], (0, 5), value=processor.tokenizer.pad_token_id),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 5)),
        "labels": F.pad(inputs["labels"], (0, 5), value=-100),
        "pixel_values": inputs["pixel_values"],
    }
    loads = {name: record.metrics.load_E for name, record in model.routing.records.items()}
    torch.testing.assert_close(model(**longer).loss, output.loss, rtol=1e-6, atol=1e-6)
    for name, record in model.routing.records.items():
        assert torch.equal(record.metrics.load_E, loads[name])


def test_micro_batches_add_up_to_the_batch() -> None:
    model, processor = tiny_model(moe=MOE)
    texts, images = (
        ["a <image> red", "two", "<image> <image> what", "no"],
        [picture(c) for c in ("red", "lime", "blue")],
    )
    whole = model(**batch(processor, texts, images)).loss
    counts = {"vision": torch.tensor(3), "projector": torch.tensor(3), "language": torch.tensor(4)}
    items = sum(
        int((batch(processor, [text], images[: text.count("<image>")])["labels"][:, 1:] != -100).sum())
        for text in texts
    )
    total, used = torch.zeros(()), 0
    for text in texts:
        count = text.count("<image>")
        micro = batch(processor, [text], images[used : used + count] or None)
        used += count
        total = total + model(**micro, num_items_in_batch=torch.tensor(items), num_sequences_in_batch=counts).loss
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


def test_text_only_training_reaches_every_parameter_with_zero_gradient() -> None:
    model, processor = tiny_model(moe=MOE)
    inputs = batch(processor, ["how many shapes", "two"])
    output = model(**inputs)
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    for name, parameter in model.named_parameters():
        if not name.startswith(PREFIXES["language"]):
            assert not parameter.grad.any(), name
    assert output.loss_terms["vision/balance_loss"] == 0
    assert model.routing.records["vision.0"].metrics.tokens == 0
    model.eval()
    assert torch.equal(model(**inputs).logits, output.logits)


def test_wrong_number_of_placeholders_names_both() -> None:
    model, processor = tiny_model()
    with pytest.raises(UserError, match=r"Found total 1 <image> tokens and 2 images"):
        processor(text=["a <image>"], images=[picture(), picture()], return_tensors="pt")
    with pytest.raises(UserError, match="1 <image> tokens in the text but no images"):
        processor(text=["a <image>"], images=[], return_tensors="pt")
    inputs = batch(processor, ["a <image>"], [picture()])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(UserError, match=r"16 image placeholders.* 2 image\(s\) of 16 features make 32"):
        model(**inputs)
    alone = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    for call in (model, model.generate):
        with pytest.raises(UserError, match=r"16 image placeholders, but no image is given"):
            call(**alone)
    text_model, text_processor = tiny_model(tower=None)
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    with pytest.raises(UserError, match="images given, but this model has no vision tower"):
        text_processor(text=["a <image>"], images=[picture()])
    with pytest.raises(UserError, match="images given, but this model has no vision tower"):
        text_processor.apply_chat_template(conversation, tokenize=True)
    with pytest.raises(UserError, match=r"2 image\(s\) given, but this model has no vision tower"):
        text_model(**inputs)


def test_text_longer_than_the_context_names_both_numbers() -> None:
    model, _ = tiny_model()
    with pytest.raises(UserError, match="300 tokens is longer than the language model's context of 256"):
        model(input_ids=torch.zeros(1, 300, dtype=torch.long))


def test_packed_rows_equal_separate_rows() -> None:
    model, processor = tiny_model(moe=MOE)
    texts, images = ["a <image> red", "two shapes", "<image> how many"], [picture("red"), picture("blue")]
    counts = {"vision": torch.tensor(2), "projector": torch.tensor(2), "language": torch.tensor(3)}
    separate = batch(processor, texts, images)
    rows = [ids[mask.bool()] for ids, mask in zip(separate["input_ids"], separate["attention_mask"], strict=True)]
    packed_ids = torch.cat(rows)[None]
    labels = packed_ids.masked_fill(packed_ids == processor.image_token_id, -100)
    starts = torch.tensor([0, len(rows[0]), len(rows[0]) + len(rows[1])])
    labels[0, starts] = -100  # the first token of a sample is predicted from nothing
    sequence_ids = torch.repeat_interleave(torch.arange(3), torch.tensor([len(row) for row in rows]))[None]
    packed_ids, labels = F.pad(packed_ids, (0, 4)), F.pad(labels, (0, 4), value=-100)
    sequence_ids = F.pad(sequence_ids, (0, 4), value=-1)
    packed = model(
        input_ids=packed_ids,
        attention_mask=(sequence_ids >= 0).long(),
        labels=labels,
        sequence_ids=sequence_ids,
        pixel_values=separate["pixel_values"],
        num_sequences_in_batch=counts,
    )
    expected = model(**separate, num_sequences_in_batch=counts)
    torch.testing.assert_close(packed.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.aux_losses["language"], expected.aux_losses["language"], rtol=1e-5, atol=1e-6)


def test_checkpointing_on_equals_off_and_reentrant_is_refused() -> None:
    gradients = []
    for enable in (False, True):
        model, processor = tiny_model(moe=MOE)
        model.routing.competing = frozenset({"vision.1", "language.0"})
        if enable:
            model.activation_checkpointing_enable()
        output = model(**batch(processor, ["a <image> red", "two"], [picture()]), use_cache=False)
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)
        assert "router" not in name or gradient.any(), name
    with pytest.raises(UserError, match="use_reentrant"):
        model.activation_checkpointing_enable({"use_reentrant": True})


def test_competition_at_inference_runs_only_when_asked() -> None:
    model, processor = tiny_model(moe=MOE)
    model.eval()
    model.routing.competing = frozenset({"language.0"})
    inputs = processor(text=["a <image> red"], images=[picture()], return_tensors="pt")
    router = model(**inputs).logits
    model.routing.competing = frozenset()
    assert torch.equal(model(**inputs).logits, router)
    assert model.routing.records == {}
    model.config.competition_at_inference = True
    study = model(**inputs, output_routing=True)
    assert not torch.allclose(study.logits, router)
    assert {float(record.metrics.competition_tokens > 0) for record in model.routing.records.values()} == {1.0}
    assert model.routing.competing == frozenset()


def test_tokenizer_keeps_the_placeholder_whole() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<image>b")["input_ids"]).count("<image>") == 1


def test_tuples_in_place_of_outputs() -> None:
    model, processor = tiny_model()
    inputs = processor(text=["how many shapes"], return_tensors="pt")
    named, plain = (model.eval()(**inputs, labels=inputs["input_ids"], return_dict=flag) for flag in (True, False))
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)
    hidden = model.model(**inputs, return_dict=False)
    assert torch.equal(hidden[0], model.model(**inputs).last_hidden_state)


def test_attached_losses_reach_the_gradients_without_the_models_own_loss() -> None:
    moe = {"vision": {}, "projector": {}, "language": {}}
    gradients = []
    for attaches in (False, True):
        model, processor = tiny_model(moe=moe)
        inputs = batch(processor, ["a <image> red circle", "how many ?"], [picture()])
        labels = inputs.pop("labels")
        if attaches:  # as trl: the backbone, and a head of its own
            model.model.attached_loss_scale = 1.0
            hidden = model.base_model(**inputs).last_hidden_state
            language_loss(model.lm_head(hidden), labels, None).backward()
        else:
            model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)
    routers = [grad for name, grad in gradients[1].items() if "router" in name]
    assert routers
    assert all(grad is not None and grad.abs().sum() > 0 for grad in routers)
