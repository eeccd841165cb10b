"""Import of LLaVA's own layout and of what is built on it: logits of a slow forward, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_hf_kit import pictures, randomize
from llava_kit import (
    E,
    Llava,
    Mixture,
    assert_same_logits,
    llava_config,
    llava_tensors,
    make,
    save,
    tower_directory,
    with_mixtures,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_compete.cli import main
from llava_compete.convert.importing import import_checkpoint
from llava_compete.convert.layout import ImportOptions
from llava_compete.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig


@pytest.mark.parametrize("inside", [None, "model.vision_tower.vision_tower.vision_model."])
def test_llava_1_5(inside: str | None, tmp_path: Path) -> None:
    theirs, tokenizer = make()
    tower = tower_directory(tmp_path / "clip", theirs)
    save(tmp_path / "llava", llava_config(theirs, tower), llava_tensors(theirs, inside), tokenizer)
    report = import_checkpoint(tmp_path / "llava", tmp_path / "ours")
    assert report.layout == "llava"
    assert "chat template: vicuna_v1" in report.notes
    config = read_config(tmp_path / "ours")
    assert config.tower is not None
    assert config.tower.preprocess.resize_mode == "pad"
    assert config.text_config.vocab_size == len(tokenizer) + 1  # <image>
    assert_same_logits(tmp_path / "ours", Llava(theirs))


def test_projector_alone_with_its_base(tmp_path: Path) -> None:
    theirs, tokenizer = make()
    tower = tower_directory(tmp_path / "clip", theirs)
    tensors = llava_tensors(theirs)
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    save(tmp_path / "vicuna", theirs.config.text_config.to_dict(), tensors, tokenizer)
    (tmp_path / "llava").mkdir()
    config = llava_config(theirs, tower, _name_or_path="")
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    torch.save(projector, tmp_path / "llava" / "mm_projector.bin")
    import_checkpoint(tmp_path / "llava", tmp_path / "ours", ImportOptions(base=str(tmp_path / "vicuna")))
    assert_same_logits(tmp_path / "ours", Llava(theirs))


def test_lora_with_its_base(tmp_path: Path) -> None:
    theirs, tokenizer = make()
    tower = tower_directory(tmp_path / "clip", theirs)
    tensors = llava_tensors(theirs)
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    save(tmp_path / "vicuna", theirs.config.text_config.to_dict(), tensors, tokenizer)
    adapter = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(theirs.model.language_model, adapter)
    adapted.save_pretrained(tmp_path / "llava")
    # LLaVA adapts the whole causal LM, whose layers lie below `model`.
    stored = tmp_path / "llava" / "adapter_model.safetensors"
    lora = {re.sub(r"^base_model\.model\.", "base_model.model.model.", k): v for k, v in load_file(stored).items()}
    save_file(lora, stored)
    (tmp_path / "llava" / "config.json").write_text(json.dumps(llava_config(theirs, tower)))
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()},
        tmp_path / "llava" / "non_lora_trainables.bin",
    )
    import_checkpoint(tmp_path / "llava", tmp_path / "ours", ImportOptions(base=str(tmp_path / "vicuna")))
    theirs.model.language_model = adapted.merge_and_unload()
    assert_same_logits(tmp_path / "ours", Llava(theirs))


def goes_on(checkpoint: Path) -> None:
    """A step of training that reaches every router, saved and loaded."""
    model, processor = load_checkpoint(checkpoint)
    inputs = processor(text=["a <image> red circle"], images=pictures(1), return_tensors="pt")
    loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for name, block in moe_blocks(model).items():
        assert any(parameter.grad.any() for parameter in block.router.parameters()), name
        assert block.experts.down_proj.grad.any(), name
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save_checkpoint(model, processor, checkpoint.with_name("trained"))
    again, _ = load_checkpoint(checkpoint.with_name("trained"))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


LIBMOE = ["competesmoe", "xmoe", "smoe_share"]
LIBMOE += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("smoe", "smoe_perturbed", "smoe_sigmoidgating", "smoe_sharev3")
]


def beside(directory: Path, prefix: str) -> None:
    """Take tower and projector out of the weights into `clip.bin`, whose names are the tower's own, and
    `mm_projector.bin`."""
    stored = load_file(directory / "model.safetensors")
    inside = [name for name in stored if ".vision_tower." in name]
    clip = {prefix + name.split(".vision_tower.vision_model.")[1]: stored.pop(name) for name in inside}
    projector = {name: stored.pop(name) for name in list(stored) if ".mm_projector." in name}
    assert any(".moelayer.experts." in name for name in (*clip, *projector))
    torch.save(clip, directory / "clip.bin")
    torch.save(projector, directory / "mm_projector.bin")
    save_file(stored, directory / "model.safetensors")


@pytest.mark.parametrize("prefix", ["vision_model.", "vision_tower.vision_model."])
def test_tower_and_projector_in_files_of_their_own(prefix: str, tmp_path: Path) -> None:
    test_libmoe("competesmoe", tmp_path)
    beside(tmp_path / "libmoe", prefix)
    report = import_checkpoint(tmp_path / "libmoe", tmp_path / "split")
    assert "LibMoE's schedule, which ours computes" in report.unused.values()
    ours, split = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "split"))
    assert ours.keys() == split.keys()
    assert all(torch.equal(ours[name], split[name]) for name in ours)


@pytest.mark.parametrize("name", LIBMOE)
def test_libmoe(name: str, tmp_path: Path) -> None:
    theirs, tokenizer = make()
    tower = tower_directory(tmp_path / "clip", theirs)
    chosen = 3 if "share" in name else 2
    slow, projector = with_mixtures(theirs, name, (1, 2), chosen)
    tensors = {
        key.replace(".mlp.", ".moelayer.") if ".vision_tower." in key else key: tensor
        for key, tensor in llava_tensors(theirs, "model.vision_tower.vision_model.").items()
        if "mm_projector" not in key
    }
    tensors |= {f"model.mm_projector.moelayer.{key}": tensor for key, tensor in projector.state_dict().items()}
    settings = {
        "moe_name": name,
        "num_experts": E,
        "num_selected": chosen,
        "mm_projector_type": "moe",
        "rate_flip": 0.07,
    }
    settings |= {
        "scales": [1.0, 2.0],
        "mm_vision_select_layer": -1,
        "balance_loss_coef": 0.02,
        "router_loss_coef": 0.03,
    }
    save(tmp_path / "libmoe", llava_config(theirs, tower, **settings), tensors, tokenizer)
    report = import_checkpoint(tmp_path / "libmoe", tmp_path / "ours")
    assert ("LibMoE's schedule, which ours computes" in report.unused.values()) == (name == "competesmoe")
    assert_same_logits(tmp_path / "ours", slow)
    goes_on(tmp_path / "ours")
    moe = MoeConfig.model_validate(read_config(tmp_path / "ours").moe)
    assert moe.competition_rate == 0.07
    assert moe.vision is not None
    assert moe.vision.balance_coef == 0.02
    assert moe.vision.distillation_coef == (0.03 if name == "competesmoe" else None)


def test_cumo(tmp_path: Path) -> None:
    theirs, tokenizer = make(text={"model_type": "mistral"})
    tower = tower_directory(tmp_path / "clip", theirs)
    slow, projector = with_mixtures(theirs, "smoe", (1, 3))
    tensors = {
        re.sub(r"(layers\.\d+)\.mlp\.(gate|experts)\.", r"\1.\2.", key): tensor
        for key, tensor in llava_tensors(theirs, "model.vision_tower.vision_model.").items()
        if "mm_projector" not in key
    }
    tensors |= {f"model.mm_projector.{key}": tensor for key, tensor in projector.state_dict().items()}
    settings = {"model_type": "llava_mistral", "mm_projector_type": "smoe_mlp", "num_experts": E, "num_selected": 2}
    save(tmp_path / "cumo", llava_config(theirs, tower, scales=[1, 3], **settings), tensors, tokenizer)
    import_checkpoint(tmp_path / "cumo", tmp_path / "ours", ImportOptions(chat_template="vicuna_v1"))
    assert_same_logits(tmp_path / "ours", slow)
    goes_on(tmp_path / "ours")


def test_cumo_on_mixtral(tmp_path: Path) -> None:
    """Experts in tower, projector and language model; the last as Mixtral's own files name them."""
    theirs, tokenizer = make(text={"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2})
    tower = tower_directory(tmp_path / "clip", theirs)
    slow, projector = with_mixtures(theirs, "smoe", (1, 3))
    theirs.model.language_model.save_pretrained(tmp_path / "language")
    stored = load_file(tmp_path / "language" / "model.safetensors")
    assert "layers.0.block_sparse_moe.experts.2.w3.weight" in stored
    tensors = {f"model.{name}": tensor for name, tensor in stored.items()}
    tensors["lm_head.weight"] = theirs.lm_head.weight.detach()
    for name, tensor in theirs.model.vision_tower.state_dict().items():
        beside = re.sub(r"(layers\.\d+)\.mlp\.(gate|experts)\.", r"\1.\2.", name)
        tensors[f"model.vision_tower.vision_model.{beside}"] = tensor
    tensors |= {f"model.mm_projector.{key}": tensor for key, tensor in projector.state_dict().items()}
    settings = {"model_type": "llava_mixtral", "mm_projector_type": "smoe_mlp", "num_experts": E, "num_selected": 2}
    save(tmp_path / "cumo", llava_config(theirs, tower, scales=[1, 3], **settings), tensors, tokenizer)
    import_checkpoint(tmp_path / "cumo", tmp_path / "ours", ImportOptions(chat_template="vicuna_v1"))
    assert_same_logits(tmp_path / "ours", slow)
    model, _ = load_checkpoint(tmp_path / "ours")
    counts = {name.split(".")[0]: block.config.num_experts for name, block in moe_blocks(model).items()}
    assert counts == {"vision": E, "projector": E, "language": 3}
    goes_on(tmp_path / "ours")


def test_moe_llava(tmp_path: Path) -> None:
    theirs, tokenizer = make(text={"model_type": "qwen2"})
    layer = theirs.model.language_model.layers[1]
    layer.mlp = Mixture(layer.mlp, 32)
    randomize(theirs)
    tower = tower_directory(tmp_path / "clip", theirs)
    tensors = {
        key.replace("mlp.experts.", "mlp.deepspeed_moe.experts.deepspeed_experts.").replace(
            "mlp.gate.weight", "mlp.deepspeed_moe.gate.wg.weight"
        ): tensor
        for key, tensor in llava_tensors(theirs, "model.image_tower.image_tower.vision_model.").items()
    }
    moe = {"moe_enable": True, "top_k_experts": 2, "num_experts": [E], "moe_layers_idx": [1], "use_residual": False}
    config = llava_config(theirs, tower, model_type="moe_llava_qwen1_5", moe=moe)
    config["mm_image_tower"] = config.pop("mm_vision_tower")
    save(tmp_path / "moe", config, tensors, tokenizer)
    report = import_checkpoint(tmp_path / "moe", tmp_path / "ours", ImportOptions(chat_template="vicuna_v1"))
    assert any("DeepSpeed's" in note for note in report.notes)
    assert_same_logits(tmp_path / "ours", Llava(theirs))
    model, _ = load_checkpoint(tmp_path / "ours")
    assert list(moe_blocks(model)) == ["language.1"]
    goes_on(tmp_path / "ours")


def refused(directory: Path, tmp_path: Path, capsys: Any, *options: str) -> str:
    assert main(["import", str(directory), "--out", str(tmp_path / "ours"), *options]) == 2
    assert not (tmp_path / "ours").exists()
    return str(capsys.readouterr().err.splitlines()[-1])


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, tokenizer = make()
    tower = tower_directory(tmp_path / "clip", theirs)
    tensors = llava_tensors(theirs)
    folder = tmp_path / "alone"
    folder.mkdir()
    config = llava_config(theirs, tower, _name_or_path="")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(
        {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}, folder / "mm_projector.bin"
    )
    assert "holds no language model, and names no base; give one with --base" in refused(folder, tmp_path, capsys)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "./nowhere"}))
    assert "adapter_config.json without adapter_model.safetensors" in refused(folder, tmp_path, capsys)
    torch.save({}, folder / "adapter_model.bin")
    assert "nowhere: no such directory; give the language model" in refused(folder, tmp_path, capsys)
    assert "--base: x: no such directory" in refused(folder, tmp_path, capsys, "--base", "x")
    for number, (change, message) in enumerate(
        [
            ({"mm_vision_tower": "./clip"}, "mm_vision_tower: ./clip: no such directory; give the directory"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end: found true"),
            ({"image_aspect_ratio": "wide"}, "image_aspect_ratio: found 'wide'"),
            ({"mm_projector_type": "qformer"}, "projector.type: found 'qformer'"),
            ({"model_type": "llava_odd"}, "model_type: found 'llava_odd', of whose language model nothing is known"),
            ({"mm_projector_type": "mlp3x_gelu"}, "missing tensor mm_projector.4.weight"),
        ]
    ):
        save(tmp_path / f"bad{number}", llava_config(theirs, tower, **change), tensors, tokenizer)
        assert message in refused(tmp_path / f"bad{number}", tmp_path, capsys)
