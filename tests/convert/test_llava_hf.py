"""Import of transformers' own Llava: its logits, its pixels, its prompt; and what is refused, by name."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from llava_hf_kit import LLAVA_1_5, TEXTS, clip_config, llava_hf, pictures, siglip_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
)

from llava_compete.cli import main
from llava_compete.convert.importing import import_checkpoint
from llava_compete.convert.layout import ImportOptions
from llava_compete.model.checkpoint import load_checkpoint, save_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip_gelu_last_layer_with_class_token": {
        "vision": clip_config(hidden_act="gelu", layer_norm_eps=1e-6),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "third_hidden_state": {"vision_feature_layer": 1},
    "siglip": {"vision": siglip_config()},
    "qwen2_tied": {"text": {"model_type": "qwen2", "tie_word_embeddings": True}},
}


def logits_of(directory: Path, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the checkpoint and of transformers' model, for the same ids and pixels."""
    model, processor = load_checkpoint(directory)
    inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits, theirs(**inputs).logits


SLOW = {"siglip"}  # of width 768


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS]
)
def test_logits_are_transformers(variant: str, tmp_path: Path) -> None:
    theirs = llava_hf(tmp_path / "hf", **VARIANTS[variant])
    report = import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    assert report.layout == "llava-hf"
    ours, expected = logits_of(tmp_path / "ours", theirs)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf") / "hf"
    llava_hf(directory)
    return directory


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """The published directory, to be spoilt."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_what_came_in_trains_saves_and_loads(published: Path, tmp_path: Path) -> None:
    import_checkpoint(published, tmp_path / "ours")
    model, processor = load_checkpoint(tmp_path / "ours")
    assert (model.config.stage, model.config.parents) == ("import", [])
    inputs = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_checkpoint(model, processor, tmp_path / "again")
    again, _ = load_checkpoint(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_shards_and_both_spellings(published: Path, copy: Path, tmp_path: Path) -> None:
    def new(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            plain = name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
            plain = plain.replace(".language_model.model.", ".language_model.").replace(".vision_model.", ".")
            tensors[plain] = tensors.pop(name)

    assert "language_model.model.norm.weight" in load_file(published / "model.safetensors")
    spoil(copy, new)
    assert "model.language_model.norm.weight" in load_file(copy / "model.safetensors")
    import_checkpoint(published, tmp_path / "old")
    report = import_checkpoint(copy, tmp_path / "new", shard_bytes=100_000)
    assert report.num_shards == len(list((tmp_path / "new").glob("*.safetensors"))) > 2
    states = [load_checkpoint(tmp_path / name)[0].state_dict() for name in ("old", "new")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_memory_stays_near_the_largest_shard(published: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 20}
    theirs = llava_hf(tmp_path / "hf", text=text)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="8MB")
    (tmp_path / "hf" / "model.safetensors").unlink(missing_ok=True)
    del theirs
    sizes = [file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")]
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    import_checkpoint(published, tmp_path / "warm")  # what is imported once
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    import_checkpoint(tmp_path / "hf", tmp_path / "ours", shard_bytes=8 * 1024**2)
    done.set()
    watcher.join()
    assert sum(sizes) > 100e6
    # One shard that is read and one that is written.
    assert peak[0] - before < 3.5 * max(sizes)


def test_its_own_template_where_answers_end(published: Path, copy: Path, tmp_path: Path) -> None:
    import_checkpoint(published, tmp_path / "own")
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    theirs = AutoProcessor.from_pretrained(published).apply_chat_template(conversation, add_generation_prompt=True)
    processor = load_checkpoint(tmp_path / "own")[1]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == theirs
    (copy / "chat_template.jinja").write_text(LLAVA_1_5)
    report = import_checkpoint(copy, tmp_path / "family")
    assert "chat template: chatml" in report.notes  # the tokenizer has ChatML's tokens
    report = import_checkpoint(copy, tmp_path / "chosen", ImportOptions(chat_template="plain"))
    assert "chat template: plain" in report.notes


GONE = "multi_modal_projector.linear_2.bias"
KEYS = "vision_tower.encoder.layers.0.self_attn.k_proj.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda path: spoil(path, lambda tensors: tensors.pop(GONE)),
        r"missing tensor multi_modal_projector\.linear_2\.bias",
    ),
    "missing_language": (
        lambda path: spoil(path, lambda tensors: tensors.pop("language_model.model.norm.weight")),
        r"missing model\.language_model\.norm\.weight",
    ),
    "left_over": (
        lambda path: spoil(path, lambda tensors: tensors.update({"vision_tower.extra": torch.ones(2)})),
        r"tensors that the layout has no place for: vision_tower\.extra",
    ),
    "misshapen": (
        lambda path: spoil(path, lambda tensors: tensors.update({GONE: torch.ones(7)})),
        r"multi_modal_projector\.mlp\.down_proj\.bias \[7\] \(expected \[32\]\)",
    ),
    "misshapen_joined": (
        lambda path: spoil(path, lambda tensors: tensors.update({KEYS: torch.ones(32, 30)})),
        r"k_proj\.weight \[32, 30\]",
    ),
    "twice": (
        lambda path: spoil(path, lambda tensors: tensors.update({f"model.{GONE}": torch.ones(32)})),
        "two spellings of one tensor",
    ),
    "truncated": (
        lambda path: os.truncate(path / "model.safetensors", 5000),
        r"model\.safetensors: truncated or damaged weights",
    ),
    "pickled_code": (
        lambda path: (
            (path / "model.safetensors").unlink(),
            (path / "pytorch_model.bin").write_bytes(pickle.dumps(Path("x"))),
        ),
        r"pytorch_model\.bin: not a file of weights alone",
    ),
    "no_preprocessor": (
        lambda path: [(path / name).unlink() for name in ("processor_config.json",)],
        r"says nothing of how pictures are prepared",
    ),
    "two_layers": (
        lambda path: edit(path, vision_feature_layer=[-2, -1]),
        r"vision_feature_layer: found \[-2, -1\], expected one layer",
    ),
    "unknown": (
        lambda path: spoil(path, lambda tensors: (tensors.clear(), tensors.update(x=torch.ones(1)))),
        r"unknown layout \(model_type 'llava', x\); looked for llava-hf: vision_config and",
    ),
}


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("case", SPOILT)
def test_bad_input_is_named(case: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt, message = SPOILT[case]
    spoilt(copy)
    assert main(["import", str(copy), "--out", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {copy}")
    assert re.search(message, error)
    assert not (tmp_path / "ours").exists()


def test_the_command_says_what_came_in(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(published), "--out", str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert "layout llava-hf" in printed
    assert "left out: 18 tensor(s), behind the feature layer" in printed
    assert main(["import", str(published), "--out", str(tmp_path / "ours")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["import", str(published), "--out", "."]) == 2
    assert "--out: found '.', expected a directory by a name of its own" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "ours"), "--out", str(tmp_path / "b")]) == 2
    assert "a checkpoint of llava_compete already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing"), "--out", str(tmp_path / "b")]) == 2
    assert "no such directory" in capsys.readouterr().err
