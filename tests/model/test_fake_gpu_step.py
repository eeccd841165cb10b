"""A training step as a GPU would run it, on fake CUDA tensors: what reads a value on the host, or mixes devices, raises
(fake_gpu.py). Forward and backward, with images and without, for every router and both kinds of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import HostReadError, backward, fake_gpu, move_to_fake_gpu
from naflex_kit import TOWER
from tiny import tiny_model
from torch import Tensor, nn

from llava_compete.model import backbone
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.terms import ROUTERS

ROWS, LENGTH = 2, 64
PARTS = ("vision", "projector", "language")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def _step(
    router: str,
    competing: bool = False,
    packed: bool = False,
    images: bool = True,
    section: dict[str, Any] | None = None,
    **config: Any,
) -> nn.Module:
    """The model after forward and backward of a micro-batch; `section`: of a tower for pictures of any size."""
    moe = {key: {"num_experts": 4, "num_experts_per_tok": 2, "router": router, **config} for key in PARTS}
    model, processor = tiny_model(moe, **(section or {}))
    model = model.to(torch.bfloat16)
    with fake_gpu():
        move_to_fake_gpu(model)
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="cuda")
        one = torch.ones((), device="cuda")
        # As the collator hands it over: few positions with a label, padding at the end, bytes for pixels.
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids, "num_items_in_batch": one, "right_padded": True}
        inputs["label_positions"] = torch.zeros(LENGTH // 4, dtype=torch.long, device="cuda")
        inputs["num_sequences_in_batch"] = dict.fromkeys(PARTS, one)
        if packed:
            inputs |= {"sequence_ids": torch.zeros_like(ids), "num_local_sequences": 3}
        else:
            inputs["attention_mask"] = torch.ones_like(ids)
        if images and section is None:
            inputs["pixel_values"] = torch.zeros(ROWS, 3, 28, 28, dtype=torch.uint8, device="cuda")
        elif images:
            inputs["image_sizes"] = [(28, 56), (30, 20)]
            count = sum(map(processor.tiling.num_tiles, inputs["image_sizes"]))
            side = model.config.tower.image_size
            inputs["pixel_values"] = torch.zeros(count, 3, side, side, dtype=torch.uint8, device="cuda")
        if competing:
            model.routing.competing = frozenset(f"{part}.0" for part in PARTS)
        backward(model(**inputs).loss)
    return model


CASES = [*((router, False) for router in ROUTERS), ("competition", True)]


# A router sees padded or packed tokens; it does not see whether some of them were pictures: each pair once.
ROWS_OF = {"padded-images": (False, True), "packed-text": (True, False)}


@pytest.mark.parametrize(("packed", "images"), ROWS_OF.values(), ids=ROWS_OF)
@pytest.mark.parametrize(("router", "competing"), CASES)
def test_a_training_step_never_waits_for_the_gpu(router: str, competing: bool, packed: bool, images: bool) -> None:
    check_gradients(_step(router, competing, packed, images))


@pytest.mark.parametrize(("packed", "images"), [(True, True), (False, False)], ids=["packed-images", "padded-text"])
def test_nor_does_one_of_the_other_rows(packed: bool, images: bool) -> None:
    check_gradients(_step("softmax", packed=packed, images=images))


def check_gradients(model: nn.Module) -> None:
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    assert experts
    for parameter in experts:
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.device.type == "cuda"


@pytest.mark.parametrize("keeps", ["pre_activations", "input"])
def test_nor_does_a_competition_that_is_computed_again(keeps: str) -> None:
    check_gradients(_step("competition", competing=True, competition_keeps=keeps, competition_chunk_tokens=40))


@pytest.mark.parametrize(
    "rule",
    [
        {"competition_margin": 0.0},
        {},
        {"competition_contenders": 1},
        {"experts_implementation": "dense"},
        {"competition_answers": "both"},
        {"competition_answers": "mean"},
    ],
    ids=["all", "margin", "contenders", "dense", "both", "means"],
)
def test_nor_does_one_that_the_loss_judges(rule: dict[str, Any]) -> None:
    model = _step("competition", competition_judge="loss", **rule)
    check_gradients(model)
    for name, parameter in model.named_parameters():
        assert "router" not in name or parameter.grad is not None


def test_nor_does_one_that_only_teaches() -> None:
    check_gradients(_step("competition", competing=True, competition_output="router"))


@pytest.mark.parametrize("router", ["xmoe", "competition"])
def test_nor_does_the_coupling_loss(router: str) -> None:
    check_gradients(_step(router, competing=router == "competition", coupling_coef=1.0))


def test_nor_do_dense_products() -> None:
    check_gradients(_step("softmax", experts_implementation="dense"))


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize(
    "section", [{"tiles": {"max": 2}}, {"tower": TOWER, "naflex": {"max_patches": 24}}], ids=["tiles", "naflex"]
)
def test_nor_do_pictures_of_any_size(section: dict[str, Any], images: bool) -> None:
    check_gradients(_step("softmax", images=images, section=section))


def test_a_read_on_the_host_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SparseMoeBlock.forward

    def forward(self: SparseMoeBlock, x: Tensor) -> Tensor:
        output = plain(self, x)
        output.sum().item()
        return output

    monkeypatch.setattr(SparseMoeBlock, "forward", forward)
    with pytest.raises(HostReadError):
        _step("softmax")


def test_a_selection_by_mask_in_the_backward_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def scatter(embeds: Tensor, places: Tensor, features: Tensor) -> Tensor:
        return embeds.masked_scatter(places.unsqueeze(-1), features)

    monkeypatch.setattr(backbone, "place_features", scatter)
    with pytest.raises(HostReadError):
        _step("softmax")


def test_eager_experts_would_be_seen() -> None:
    with pytest.raises(HostReadError, match="grouped_linear"):
        _step("softmax", experts_implementation="eager")
