"""A model with a NaFlex tower: batches of mixed sizes, pooling, experts (stages: train/test_tiled_stage)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naflex_kit import TOWER
from PIL import Image
from tiny import tiny_model, tiny_section, tiny_tokenizer

from llava_compete.convert.exporting import export_checkpoint
from llava_compete.errors import UserError
from llava_compete.evaluation.answerer import Answerer, Prompt
from llava_compete.evaluation.generation_settings import GenerationSettings
from llava_compete.model.build import build_model
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import upcycle
from llava_compete.moe.config import MoeConfig
from llava_compete.plan.step_cost import simulate
from llava_compete.vision.naflex import NativeSizes

LAYER = {"num_experts": 3, "num_experts_per_tok": 2}
NAFLEX: dict[str, Any] = {"tower": TOWER, "naflex": {"max_patches": 24}}
SIZES = [(40, 90), (28, 28), (150, 61)]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.mark.parametrize("pool", [1, 2])
def test_upcycled_and_saved_it_answers_the_same(pool: int, tmp_path: Path) -> None:
    model, processor = tiny_model(pool=pool, **NAFLEX)
    inputs = processor(images=pictures(), text="<image> a <image> b <image>", return_tensors="pt")
    told = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == sum(told["num_image_tokens"])
    assert len(inputs["pixel_values"]) == sum(told["num_image_patches"])
    save_checkpoint(model.eval(), processor, tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"projector": LAYER, "vision": LAYER}))
    expected = model(**inputs).logits
    for name in ("dense", "moe"):
        loaded, again = load_checkpoint(tmp_path / name)
        assert again.tiling == processor.tiling == loaded.config.tiling == NativeSizes(8, pool, 24)
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_answers_do_not_depend_on_the_batch() -> None:
    model, processor = tiny_model(**NAFLEX)
    given = pictures()
    prompts = [
        Prompt(f"what colour is {number} ?", partial(given.__getitem__, slice(number, number + 1)))
        for number in range(3)
    ]
    prompts.append(Prompt("<image> and <image> ?", lambda: [given[2], given[0]]))
    options = [GenerationSettings((), 4, ())] * len(prompts)
    found = [Answerer(model.eval(), processor, size).generate(prompts, options) for size in (1, 8)]
    assert found[0] == found[1]


def test_each_picture_is_one_sequence_of_the_routing_losses() -> None:
    model, processor = tiny_model(moe={"vision": LAYER, "projector": LAYER}, pool=2, **NAFLEX)
    model.train()
    one_by_one = [processor(images=[image], text="<image>", return_tensors="pt") for image in pictures()]
    together = processor(images=pictures(), text="<image><image><image>", return_tensors="pt")
    count = dict.fromkeys(("vision", "projector", "language"), torch.tensor(3.0))
    alone = [model.model(**inputs, num_sequences_in_batch=count).aux_losses for inputs in one_by_one]
    found = model.model(**together, num_sequences_in_batch=count).aux_losses
    for part in ("vision", "projector"):
        torch.testing.assert_close(found[part], sum(losses[part] for losses in alone), rtol=1e-4, atol=1e-6)


def test_a_text_alone_reaches_every_parameter_of_the_front() -> None:
    model, processor = tiny_model(pool=2, **NAFLEX)
    inputs = processor(text="what ?", return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    front = {name: p.grad for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name}
    assert all(grad is not None and not grad.any() for grad in front.values())


def test_a_step_is_planned_without_weights() -> None:
    with torch.device("meta"):
        model, _ = tiny_model(moe={"vision": LAYER}, pool=2, **NAFLEX)
    assert simulate(model, rows=2, length=40, images=2, competing=frozenset()).flops > 0


def test_no_llava_of_transformers_takes_its_place(tmp_path: Path) -> None:
    model, processor = tiny_model(**NAFLEX)
    save_checkpoint(model, processor, tmp_path / "ours")
    with pytest.raises(UserError, match=r"own proportions \(vision_tower\.naflex\), which Llava has not"):
        export_checkpoint(tmp_path / "ours", tmp_path / "theirs")


def test_chunks_are_refused() -> None:
    section = tiny_section(**NAFLEX).model_copy(update={"tile_batch": 3})
    with pytest.raises(UserError, match=r"model\.tile_batch: found 3, but a NaFlex tower takes all pictures"):
        build_model(section, None, 0, tiny_tokenizer())
