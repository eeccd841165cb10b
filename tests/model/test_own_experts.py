"""Experts that a language model brings: their balance loss is trained, for any cut of a batch; and linear attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_families import OWN_EXPERTS, family_model
from test_forward import batch, picture
from transformers import AutoModelForCausalLM

from llava_compete.errors import UserError
from llava_compete.plan.plan import count_parameters

TEXTS = ["how many shapes are there ? two shapes", "red", "the circle is red"]


def text_inputs(model: Any, processor: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch(processor, texts).items() if key != "pixel_values"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "granitemoe"])
def test_balance_loss_of_one_sequence_is_transformers(family: str) -> None:
    model, processor = family_model(family)
    coef = model.config.text_config.router_aux_loss_coef
    assert coef > 0
    plain = AutoModelForCausalLM.from_config(model.config.text_config)
    plain.base_model.load_state_dict(model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    inputs = text_inputs(model, processor, TEXTS[:1])
    theirs = plain.train()(**inputs, output_router_logits=True)
    ours = model.train()(**inputs)
    torch.testing.assert_close(ours.loss_terms["language/own_balance_loss"], theirs.aux_loss.detach())
    torch.testing.assert_close(ours.aux_losses["language"], coef * theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    theirs.loss.backward()
    ours.loss.backward()
    expected = dict(plain.base_model.named_parameters())
    for name, parameter in model.language_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_balance_loss_does_not_depend_on_padding_or_cuts() -> None:
    model, processor = family_model("qwen3_moe")
    model.train()
    counts = {"language": torch.tensor(3.0), "vision": torch.tensor(1.0), "projector": torch.tensor(1.0)}
    whole = model(**text_inputs(model, processor, TEXTS), num_sequences_in_batch=counts)
    parts = [model(**text_inputs(model, processor, [text]), num_sequences_in_batch=counts) for text in TEXTS]
    torch.testing.assert_close(whole.aux_losses["language"], sum(part.aux_losses["language"] for part in parts))
    assert "language/own_balance_loss" not in model.eval()(**text_inputs(model, processor, TEXTS)).loss_terms


def test_balance_loss_has_the_same_gradients_with_checkpointing() -> None:
    gradients = []
    for enable in (False, True):
        model, processor = family_model("qwen3_moe")
        model.config.text_config.router_aux_loss_coef = 1.0
        if enable:
            model.activation_checkpointing_enable()
        model.train()(**batch(processor, ["a <image> red", "two"], [picture()]), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", OWN_EXPERTS)
def test_a_token_uses_some_of_its_own_experts(family: str) -> None:
    model, _ = family_model(family)
    part = count_parameters(model)["language"]
    experts = sum(p.numel() for name, p in model.language_model.named_parameters() if ".experts." in name)
    assert experts > 0
    assert part.active == part.total - experts // 2  # 2 of 4


def test_packed_rows_do_not_pass_through_a_running_state() -> None:
    model, _ = family_model("qwen3_5_text")
    ids = torch.arange(5, 15)[None]
    with pytest.raises(UserError, match=r"packing: a 'qwen3_5_text' model has layers with a running state"):
        model(input_ids=ids, sequence_ids=torch.tensor([[0] * 5 + [1] * 5]))
