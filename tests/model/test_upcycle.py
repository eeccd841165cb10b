"""Upcycling: the MoE checkpoint answers as its dense parent, for every router, family and part; and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_forward import picture
from tiny import tiny_model

from llava_compete.cli import main
from llava_compete.config import dump_yaml, load_config
from llava_compete.errors import UserError
from llava_compete.model.build import load_checkpoint, save_checkpoint
from llava_compete.model.upcycle import UpcycleConfig, upcycle
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.router_table import ROUTER_CLASSES
from llava_compete.moe.terms import ROUTERS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    model, processor = tiny_model()
    save_checkpoint(model, processor, tmp_path / "dense")
    return tmp_path / "dense"


def logits(directory: Path) -> torch.Tensor:
    model, processor = load_checkpoint(directory)
    inputs = processor(text=["a <image> red", "how many"], images=[picture()], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_and_part_equals_dense(
    router: str, dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moe = {part: {"router": router} for part in ("vision", "projector", "language")}
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate(moe))
    exact = ROUTER_CLASSES[router].keeps_dense_answers
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=1e-5 if exact else 0.5)
    assert ("does not answer as its parent" in caplog.text) != exact


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("demo/upcycle_*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_routers_name_theirs(path: Path) -> None:
    config = load_config(UpcycleConfig, path)
    name = path.stem.removeprefix("upcycle_")
    assert [part.router for part in config.moe.parts().values()] == ["softmax" if name == "coupled" else name]
    assert all(part.couples == (name == "coupled") for part in config.moe.parts().values())


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_each_part_alone_equals_dense_also_in_competition(part: str, dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({part: {"num_experts": 3, "num_experts_per_tok": 1}}))
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    config["competition_at_inference"] = True
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=1e-5)


def test_layer_choice_report_and_history(dense: Path, tmp_path: Path) -> None:
    moe = MoeConfig.model_validate({"vision": {"layers": [1]}, "language": {"layers": {"every": 2, "offset": 1}}})
    report = upcycle(dense, tmp_path / "moe", moe)
    model, _ = load_checkpoint(tmp_path / "moe")
    assert list(moe_blocks(model)) == ["vision.1", "language.1"]
    assert (model.config.stage, model.config.parents) == ("upcycle", ["initial"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after == parameters
    experts = sum(p.numel() for block in moe_blocks(model).values() for p in block.experts.parameters())
    assert report.parameters_active == parameters - experts // 2
    routers = sum(p.numel() for block in moe_blocks(model).values() for p in block.router.parameters())
    assert report.parameters_before == parameters - experts * 3 // 4 - routers


def test_nothing_of_the_parents_run_comes_along(dense: Path, tmp_path: Path) -> None:
    """Its scores would be shown as the new model's, by `push` and `report`; a training checkpoint has its optimizer."""
    for name in ("eval_digits/summary.json", "report/report.html", "global_step4/x.pt", "run/manifest.json"):
        (dense / name).parent.mkdir()
        (dense / name).touch()
    for name in ("optimizer.pt", "rng_state.pth", "trainer_state.json", "complete.json", "latest", "zero_to_torch.py"):
        (dense / name).touch()
    (dense / "README.md").write_text("a dense model of mine")
    (dense / "LICENSE").touch()
    before = {path.name for path in tmp_path.iterdir()}
    upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({"language": {}}))
    assert {path.name for path in tmp_path.iterdir()} - before == {"moe"}
    ours = {"config.json", "generation_config.json", "model.safetensors", "modeling_llava_compete.py", "README.md"}
    theirs = {"LICENSE", "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "moe").iterdir()} == ours | theirs
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "- language: router" in card
    assert 'from_pretrained("moe")' in card


def test_experts_are_copies_and_routers_follow_the_seed(dense: Path, tmp_path: Path) -> None:
    moe = MoeConfig.model_validate({"language": {}})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(dense, tmp_path / name, moe, seed=seed)
    blocks = {name: moe_blocks(load_checkpoint(tmp_path / name)[0])["language.0"] for name in "abc"}
    assert torch.equal(blocks["a"].router.weight, blocks["b"].router.weight)
    assert not torch.equal(blocks["a"].router.weight, blocks["c"].router.weight)
    assert float(blocks["a"].router.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    parent = load_file(dense / "model.safetensors")
    gate = parent["model.language_model.layers.0.mlp.gate_proj.weight"]
    for expert in blocks["a"].experts.gate_up_proj:
        assert torch.equal(expert[: len(gate)], gate)


def test_shards_are_small_and_hold_everything_once(dense: Path, tmp_path: Path) -> None:
    moe = MoeConfig.model_validate({"vision": {}, "language": {}})
    upcycle(dense, tmp_path / "one", moe)
    upcycle(dense, tmp_path / "many", moe, shard_bytes=64 * 1024)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    for file in files:
        with safe_open(tmp_path / "many" / file, framework="pt") as shard:
            assert all(index["weight_map"][key] == file for key in shard.keys())  # noqa: SIM118
        biggest = max(t.numel() * 4 for t in load_file(tmp_path / "many" / file).values())
        assert (tmp_path / "many" / file).stat().st_size <= max(64 * 1024, biggest) + 4096
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_the_umask_says_who_may_read_the_weights(dense: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        upcycle(dense, tmp_path / "moe", MoeConfig.model_validate({"language": {}}), seed=0)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "moe").glob("*.safetensors")} == {"0o640"}


def test_memory_stays_near_a_shard(tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(language={"hidden_size": 128, "intermediate_size": 4096}), tmp_path / "dense")
    moe = MoeConfig.model_validate({"language": {"num_experts": 16}})
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    upcycle(tmp_path / "dense", tmp_path / "moe", moe, shard_bytes=8 * 1024**2)
    done.set()
    watcher.join()
    largest = 16 * 2 * 4096 * 128 * 4  # one layer's gate and up projections, 32 MiB
    written = sum(file.stat().st_size for file in (tmp_path / "moe").glob("*.safetensors"))
    assert written > 2.9 * largest
    assert peak[0] - before < 1.9 * largest


def test_half_precision_stays(dense: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(dense, dtype=torch.bfloat16)
    save_checkpoint(model, processor, tmp_path / "half")
    upcycle(tmp_path / "half", tmp_path / "moe", MoeConfig.model_validate({"language": {}}))
    loaded, _ = load_checkpoint(tmp_path / "moe")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_refusals(dense: Path, tmp_path: Path) -> None:
    moe = MoeConfig.model_validate({"language": {}})
    upcycle(dense, tmp_path / "moe", moe)
    with pytest.raises(UserError, match="already a mixture of experts"):
        upcycle(tmp_path / "moe", tmp_path / "again", moe)
    with pytest.raises(UserError, match="no part given"):
        upcycle(dense, tmp_path / "none", MoeConfig())
    with pytest.raises(UserError, match=r"moe\.language\.layers: found 5, expected numbers below 2"):
        upcycle(dense, tmp_path / "none", MoeConfig.model_validate({"language": {"layers": [5]}}))
    with pytest.raises(UserError, match="is the parent itself"):
        upcycle(dense, dense, moe)
    with pytest.raises(UserError, match="not empty"):
        upcycle(dense, tmp_path, moe)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model type 'llama', expected 'llava_compete'"):
        upcycle(tmp_path / "other", tmp_path / "none", moe)
    weights = load_file(dense / "model.safetensors")
    del weights["model.language_model.layers.0.mlp.down_proj.weight"]
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing model\.language_model\.layers\.0\.mlp\.down_proj\.weight"):
        upcycle(dense, tmp_path / "none", moe)
    assert not (tmp_path / "none").exists()


def test_a_tied_tensor_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    save_checkpoint(*tiny_model(language={"tie_word_embeddings": True}), tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    head, embeddings = "lm_head.weight", "model.language_model.embed_tokens.weight"
    parameters = sum(tensor.numel() for tensor in weights.values())
    save_file(
        {**weights, head: weights[embeddings].clone()}, tmp_path / "dense" / "model.safetensors", {"format": "pt"}
    )
    report = upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"vision": {}}))
    assert report.parameters_before == parameters
    assert head not in load_file(tmp_path / "moe" / "model.safetensors")
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(tmp_path / "dense"), rtol=0, atol=1e-5)


def test_unknown_family_says_what_to_add(tmp_path: Path) -> None:
    model, processor = tiny_model(language={"model_type": "helium", "head_dim": 8})
    save_checkpoint(model, processor, tmp_path / "dense")
    with pytest.raises(UserError, match=r"no row for the language model family 'helium'.*FAMILIES in .*families\.py"):
        upcycle(tmp_path / "dense", tmp_path / "moe", MoeConfig.model_validate({"language": {}}))


def test_linear_projector_cannot_be_a_mixture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moe\.projector: a linear projector has no feed-forward block"):
        tiny_model(moe={"projector": {}}, projector="linear")


def test_command_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "up.yaml"
    config.write_text(
        f"model: {{checkpoint: /nowhere}}\noutput_dir: {tmp_path}/x\nmoe: {{language: {{num_experts: 2}}}}\n"
    )
    out = tmp_path / "moe"
    assert main(["upcycle", str(dense), "--out", str(out), "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "language" in printed
    assert "active for a token" in printed
    assert (out / "run" / "manifest.json").is_file()
    assert main(["info", str(out), "--json", str(tmp_path / "info.json")]) == 0
    facts = json.loads((tmp_path / "info.json").read_text())
    assert (facts["stage"], facts["parents"]) == ("upcycle", ["initial"])
    assert facts["moe"]["language"]["layers"] == [0, 1]
    model, _ = load_checkpoint(out)
    assert facts["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    weights = load_file(out / "model.safetensors")
    lost = "model.language_model.layers.1.mlp.experts.down_proj"
    del weights[lost]
    save_file(
        {**weights, "model.multi_modal_projector.mlp.up_proj.bias": torch.zeros(3)},
        out / "model.safetensors",
        {"format": "pt"},
    )
    assert main(["info", str(out)]) == 2
    assert (
        f"missing {lost}; mismatched model.multi_modal_projector.mlp.up_proj.bias [3] (expected [32])"
        in capsys.readouterr().err
    )
    assert main(["upcycle", "--config", str(config)]) == 2
    assert "no such checkpoint directory" in capsys.readouterr().err


def test_an_earlier_result_is_kept_where_it_is_of_this_parent_and_config(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "upcycle.yaml"
    moe = {"language": {"num_experts": 4}}
    dump_yaml({"model": {"checkpoint": str(dense)}, "output_dir": str(tmp_path / "moe"), "moe": moe}, config)
    command = ["upcycle", "--config", str(config), "--keep"]
    assert main(command) == 0
    before = (tmp_path / "moe" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'moe'}: upcycled already\n"
    shutil.rmtree(tmp_path / "moe" / "run")  # as a kill before the record was written leaves it
    assert main(command) == 0
    assert (tmp_path / "moe" / "run" / "manifest.json").is_file()
    before = (tmp_path / "moe" / "model.safetensors").stat().st_mtime_ns
    assert main([*command, "moe.language.num_experts=8"]) == 2
    assert "moe.language.num_experts was 4, is 8" in capsys.readouterr().err
    weights = load_file(dense / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, dense / "model.safetensors", {"format": "pt"})
    assert main(command) == 2
    assert "parent was " in capsys.readouterr().err
    assert (tmp_path / "moe" / "model.safetensors").stat().st_mtime_ns == before
    assert main(command[:-1]) == 0
    assert (tmp_path / "moe" / "model.safetensors").stat().st_mtime_ns > before
