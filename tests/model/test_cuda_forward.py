"""The training forward as a GPU would run it, on fake CUDA tensors: what reads a value on the host, or mixes devices,
raises. Such tensors have shapes and devices but no memory, so no GPU is needed; a backward pass would need one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.config import ROUTERS

ROWS, LENGTH = 2, 64
PARTS = ("vision", "projector", "language")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def _on_fake_gpu(model: nn.Module) -> None:
    """Replace all parameters and buffers; inside a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def _loss(router: str, competing: bool, packed: bool, images: bool) -> Tensor:
    moe = {key: {"num_experts": 4, "num_experts_per_tok": 2, "router": router} for key in PARTS}
    model, _ = tiny_model(moe)
    model = model.to(torch.bfloat16)
    with FakeTensorMode():
        _on_fake_gpu(model)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="cuda")
        one = torch.ones((), device="cuda")
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "num_items_in_batch": one}
        inputs["num_sequences_in_batch"] = dict.fromkeys(PARTS, one)
        if packed:
            inputs |= {"sequence_ids": torch.zeros_like(ids), "num_local_sequences": 3}
        else:
            inputs["attention_mask"] = torch.ones_like(ids)
        if images:
            inputs["pixel_values"] = torch.zeros(ROWS, 3, 28, 28, device="cuda")
        if competing:
            model.routing.competing = frozenset(f"{part}.0" for part in PARTS)
        return model(**inputs).loss


CASES = [*((router, False) for router in ROUTERS), ("competition", True)]


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("router", "competing"), CASES)
def test_a_training_forward_never_waits_for_the_gpu(router: str, competing: bool, packed: bool, images: bool) -> None:
    loss = _loss(router, competing, packed, images)
    assert loss.device.type == "cuda"
    assert loss.requires_grad


def test_a_read_on_the_host_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SparseMoeBlock.forward

    def forward(self: SparseMoeBlock, x: Tensor) -> Tensor:
        output = plain(self, x)
        output.sum().item()
        return output

    monkeypatch.setattr(SparseMoeBlock, "forward", forward)
    with pytest.raises(DataDependentOutputException):
        _loss("softmax", competing=False, packed=False, images=True)
