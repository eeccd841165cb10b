"""A competition that the loss judges in whole models: beside LoRA on the experts, and in packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_forward import batch, picture
from tiny import tiny_model
from torch import Tensor

from llava_compete.model.lora import LoraSettings, add_adapters
from llava_compete.moe.block import SparseMoeBlock

JUDGED = {"num_experts": 4, "num_experts_per_tok": 2, "competition_judge": "loss", "competition_margin": 0.0}


def gradients(model: Any, inputs: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Of the parameters with `name` in theirs, by the last two parts of that and their order."""
    model.zero_grad()
    model(**inputs).loss.backward()
    found = [parameter.grad for key, parameter in model.named_parameters() if name in key and parameter.requires_grad]
    assert found
    assert all(grad is not None for grad in found)
    return {f"{name} {number}": grad.clone() for number, grad in enumerate(found)}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's remark on merging
def test_adapted_experts_are_asked_as_the_merged_ones_are(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {**JUDGED, "experts_implementation": implementation}
    model, processor = tiny_model({"language": layer}, tower=None, language={"num_hidden_layers": 1})
    adapted = add_adapters(model, {"language": LoraSettings(rank=2, alpha=4)}).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_("lora_" in name or "router" in name)  # as a stage with adapters trains
    inputs = batch(processor, ["a red circle", "how many shapes are there ?"])
    judged, of_adapters = (gradients(adapted, inputs, name) for name in ("router", "experts"))
    with monkeypatch.context() as patches:
        patches.setattr(SparseMoeBlock, "_asks", lambda *_: False)
        unjudged, of_adapters_alone = (gradients(adapted, inputs, name) for name in ("router", "experts"))
    assert (judged["router 0"] - unjudged["router 0"]).norm() > 0.05 * unjudged["router 0"].norm()
    torch.testing.assert_close(of_adapters, of_adapters_alone, rtol=0, atol=0)  # nothing flows into who is asked
    merged = adapted.merge_and_unload().train()
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_("router" in name)
    torch.testing.assert_close(judged, gradients(merged, inputs, "router"), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", [{}, {"competition_margin": 0.8, "competition_contenders": 1}], ids=str)
def test_packed_rows_are_judged_as_separate_ones(rule: dict[str, Any]) -> None:
    model, processor = tiny_model({"vision": {**JUDGED, **rule}, "language": {**JUDGED, **rule}})
    model.train()
    texts = ["a <image> red", "two shapes", "<image> how many"]
    separate = batch(processor, texts, [picture("red"), picture("blue")])
    rows = [ids[mask.bool()] for ids, mask in zip(separate["input_ids"], separate["attention_mask"], strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.cat(rows)[None]
    labels = ids.masked_fill(ids == processor.image_token_id, -100)
    labels[0, lengths.cumsum(0)[:-1]] = -100  # the first token of a sample is predicted from nothing
    sequence_ids = F.pad(torch.repeat_interleave(torch.arange(3), lengths)[None], (0, 4), value=-1)
    packed = {
        "input_ids": F.pad(ids, (0, 4)),
        "attention_mask": (sequence_ids >= 0).long(),
        "labels": F.pad(labels, (0, 4), value=-100),
        "sequence_ids": sequence_ids,
        "pixel_values": separate["pixel_values"],
    }
    options = {
        "num_items_in_batch": 10,
        "num_sequences_in_batch": {"vision": torch.tensor(2), "language": torch.tensor(3)},
    }
    of_packed = gradients(model, {**packed, **options}, "router")
    assert len(of_packed) == len(model.language_model.layers) + len(model.vision_tower.trunk.transformer.resblocks)
    torch.testing.assert_close(of_packed, gradients(model, {**separate, **options}, "router"), rtol=1e-4, atol=1e-7)
