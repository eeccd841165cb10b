"""LLaVA-NeXT in and out, with its tiles: transformers' own class, processor and files on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_hf_kit import CHATML_PARTS, TEXTS, clip_config, make_llava, siglip_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from llava_compete.cli import main
from llava_compete.convert.exporting import export_checkpoint
from llava_compete.convert.importing import import_checkpoint
from llava_compete.errors import UserError
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint

SIDE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28]]
LONG = {"max_position_embeddings": 1024}


def llava_next(directory: Path, pinpoints: Any = PINPOINTS, crop: int = SIDE, **options: Any) -> Any:
    """Save a random model as llava-hf's 1.6 repositories are."""
    tokenizer = tiny_tokenizer()
    classes = {"model": LlavaNextForConditionalGeneration, "config": LlavaNextConfig}
    built = make_llava(tokenizer, text=LONG, image_grid_pinpoints=PINPOINTS, **classes, **options)
    built.save_pretrained(directory)
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": crop, "width": crop}, image_grid_pinpoints=pinpoints
    )
    strategy = built.config.vision_feature_select_strategy
    LlavaNextProcessor(
        pictures, tokenizer, patch_size=7, vision_feature_select_strategy=strategy, num_additional_image_tokens=1,
        chat_template=CHATML_PARTS,
    ).save_pretrained(directory)  # fmt: skip
    return built


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


WIDE_AND_TALL = pictures((30, 95), (120, 41))


def inputs_of(directory: Path) -> Any:
    """By transformers' own processor."""
    processor = AutoProcessor.from_pretrained(directory)
    return processor(text=TEXTS, images=WIDE_AND_TALL, return_tensors="pt", padding=True, padding_side="left")


def test_it_comes_in_with_its_tiles_trains_and_goes_out_again(tmp_path: Path) -> None:
    theirs = llava_next(tmp_path / "next")
    report = import_checkpoint(tmp_path / "next", tmp_path / "ours")
    assert "image_newline" not in report.unused
    model, processor = load_checkpoint(tmp_path / "ours")
    assert model.config.tower.tiles == ((1, 2), (2, 1), (2, 2), (3, 1))
    inputs = processor(text=TEXTS, images=WIDE_AND_TALL, return_tensors="pt", padding=True, padding_side="left")
    expected_inputs = inputs_of(tmp_path / "next")
    assert torch.equal(inputs["input_ids"], expected_inputs["input_ids"]), "as many tokens of each picture"
    with torch.no_grad():
        expected = theirs(**expected_inputs).logits
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-5)

    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.multi_modal_projector.image_newline.grad.any()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_checkpoint(model, processor, tmp_path / "trained")
    export_checkpoint(tmp_path / "trained", tmp_path / "out")
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
        assert not torch.allclose(trained, expected, atol=1e-3)
        torch.testing.assert_close(again(**inputs_of(tmp_path / "out")).logits, trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("moe", [None, {"language": {"num_experts": 3, "router": "softmax"}}], ids=["dense", "mixtral"])
def test_tiles_of_ours_go_out_as_llava_next(moe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny_model(tiles={"max": 4}, language=LONG, moe=moe)
    save_checkpoint(model.eval(), processor, tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--to", "llava-hf", "--out", str(tmp_path / "out")]) == 0
    assert "LlavaNextForConditionalGeneration" in capsys.readouterr().out
    theirs, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = processor(text=TEXTS, images=WIDE_AND_TALL, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        found, expected = theirs.eval()(**inputs_of(tmp_path / "out")).logits, model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_siglip_tower_in_tiles_goes_out_and_comes_in_again(tmp_path: Path) -> None:
    """All its features are patches, and none is left out."""
    model, processor = tiny_model(tower=siglip_tower(), tiles={"max": 2}, language=LONG)
    save_checkpoint(model.eval(), processor, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "next")
    import_checkpoint(tmp_path / "next", tmp_path / "again")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "next").eval()
    again, its_processor = load_checkpoint(tmp_path / "again")
    its_inputs = its_processor(text=TEXTS, images=WIDE_AND_TALL, return_tensors="pt", padding=True)
    inputs = processor(text=TEXTS, images=WIDE_AND_TALL, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs(**inputs_of(tmp_path / "next")).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(again.eval()(**its_inputs).logits, expected, rtol=0, atol=2e-5)


def test_a_padded_picture_beside_its_tiles_does_not_go_out(tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(tiles={}, preprocess={"resize_mode": "pad"}, language=LONG), tmp_path / "ours")
    with pytest.raises(UserError, match=r"preprocess\.resize_mode: found pad, and LLaVA-NeXT squashes"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pinpoints": [[28, 56], [40, 28]]},
            "preprocessor: image_grid_pinpoints: found [40, 28], expected multiples of 28",
        ),
        ({"crop": 14}, "preprocessor: crop_size: found {'height': 14, 'width': 14}, expected 28, the side of a tile"),
        ({"pinpoints": [[28, 56]]}, "image_grid_pinpoints: the preprocessor's are not those of config.json"),
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy: found 'full', expected 'default'",
        ),
    ],
)
def test_what_cannot_come_in_says_why(
    options: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llava_next(tmp_path / "next", **options)
    assert main(["import", str(tmp_path / "next"), "--out", str(tmp_path / "ours")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_newline_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava_next(tmp_path / "next", vision=clip_config(num_hidden_layers=2))
    weights = load_file(tmp_path / "next" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("image_newline")]
    del weights[name]
    save_file(weights, tmp_path / "next" / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(tmp_path / "next"), "--out", str(tmp_path / "ours")]) == 2
    assert "missing tensor image_newline" in capsys.readouterr().err
    assert json.loads((tmp_path / "next" / "config.json").read_text())["model_type"] == "llava_next"
