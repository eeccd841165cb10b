"""Forward and backward of a training step never wait for the GPU: torch's own check of synchronising calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import tiny_model

from llava_compete.data.collator import label_positions
from llava_compete.moe.terms import ROUTERS
from llava_compete.parts import IGNORE_INDEX

pytestmark = pytest.mark.gpu

ROWS, LENGTH = 2, 64
PARTS = ("vision", "projector", "language")
CASES = [*((router, False) for router in ROUTERS), ("competition", True)]
# Widths that the grouped kernels take in every part: rows of whole 16 bytes.
TOWER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 32, "head_width": 16, "layers": 3, "mlp_ratio": 2.0},
}
LANGUAGE = {"hidden_size": 64, "intermediate_size": 96}


@contextmanager
def _watching(device: torch.device, mode: str) -> Iterator[None]:
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _step(model: Any, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("router", "competing"), CASES)
def test_a_training_step_never_waits(device: torch.device, router: str, competing: bool, packed: bool) -> None:
    moe = {key: {"num_experts": 4, "num_experts_per_tok": 2, "router": router} for key in PARTS}
    model, _ = tiny_model(moe, tower=TOWER, language=LANGUAGE)
    model = model.to(device, torch.bfloat16)
    ids = torch.randint(10, 300, (ROWS, LENGTH), device=device)
    ids[:, 1 : 1 + model.config.num_image_tokens] = model.config.image_token_id
    one = torch.ones((), device=device)
    labels = ids.masked_fill(ids == model.config.image_token_id, IGNORE_INDEX)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "labels": labels,
        "label_positions": label_positions(labels),
        "pixel_values": torch.randint(0, 256, (ROWS, 3, 28, 28), dtype=torch.uint8, device=device),
        "num_items_in_batch": one,
        "num_sequences_in_batch": dict.fromkeys(PARTS, one),
    }
    if packed:
        batch |= {
            "sequence_ids": torch.arange(ROWS, device=device)[:, None].expand_as(ids),
            "num_local_sequences": ROWS,
        }
    else:
        batch |= {"attention_mask": torch.ones_like(ids), "right_padded": True}
    if competing:
        model.routing.competing = frozenset(f"{part}.0" for part in PARTS)
    _step(model, batch)  # libraries set themselves up, and may wait
    with warnings.catch_warnings(record=True) as caught, _watching(device, "warn"):
        warnings.simplefilter("always")
        _step(model, batch)
    waits = [
        f"{found.filename}:{found.lineno}" for found in caught if "called a synchronizing" in str(found.message)
    ]  # torch also says once that the mode is new
    assert not waits
    with _watching(device, "error"):
        _step(model, batch)
