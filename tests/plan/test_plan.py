"""`plan`: the published size of the paper's recipe, every recipe on the meta device, and agreement with real steps."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from llava_compete.cli import main
from llava_compete.config import read_yaml
from llava_compete.data.collator import label_positions
from llava_compete.errors import UserError
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.model.section import ModelSection
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.experts import PackedExperts
from llava_compete.parts import IGNORE_INDEX, PREFIXES
from llava_compete.plan.cluster import Cluster, Weights
from llava_compete.plan.plan import build_on_meta, plan, state_memory, weight_bytes
from llava_compete.plan.recipe import architecture, read_recipe
from llava_compete.plan.step_cost import _Recorder, simulate

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = sorted(
    path
    for name in ("phi35_siglip", "phi35_siglip_lm", "qwen3_siglip2", "vicuna7b_clip336")
    for path in (CONFIGS / name).glob("*.yaml")
)
MOE = {"vision": {}, "projector": {}, "language": {}}
BUILT: dict[str, bool] = {}


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses_and_builds_on_the_meta_device(path: Path) -> None:
    recipe = read_recipe(path, [])
    key = recipe.config.to_json_string(use_diff=False)
    if key not in BUILT:  # stages of one recipe build the same model
        with torch.device("meta"):
            model = LlavaCompeteForConditionalGeneration(recipe.config)
        BUILT[key] = all(parameter.is_meta for parameter in model.parameters())
    assert BUILT[key]
    assert (recipe.config.moe is not None) == (path.stem in ("upcycle", "sft", "sft_loss", "sft_lora"))


def test_the_papers_recipe_has_5_1_billion_parameters(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", str(CONFIGS / "phi35_siglip" / "sft.yaml"), "--gpus", "8", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert facts["parameters"]["total"] == pytest.approx(5.1e9, rel=0.01)
    assert facts["parameters"]["trainable"] == facts["parameters"]["total"]
    assert facts["parameters"]["parts"]["language"]["total"] == pytest.approx(3.82e9, rel=0.001)
    assert facts["parameters"]["active"] < facts["parameters"]["total"]
    assert facts["bytes_per_gpu"]["zero3"]["total"] < facts["bytes_per_gpu"]["zero0"]["total"] / 7.9
    assert facts["bytes_per_gpu"]["competition_step_extra"] > 0


def tiny(device: str, moe: dict[str, Any] | None, layers: int = 4) -> LlavaCompeteForConditionalGeneration:
    """Wide for its depth; with more layers what lives for a moment weighs less beside what each keeps."""
    language = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": layers}
    model, _ = tiny_model(moe=moe, language=language)
    return model if device == "cpu" else model.to("meta")


def token_ids(model: LlavaCompeteForConditionalGeneration) -> torch.Tensor:
    """Two rows of 256 tokens that begin with an image."""
    ids = torch.randint(5, 200, (2, 256))
    ids[:, :16] = model.config.image_token_id
    return ids


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once of what runs inside; `apart` are tensors that are not counted."""

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in self._apart:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


@pytest.mark.parametrize("moe", [None, {"language": {}}, MOE], ids=["dense", "language", "all"])
@pytest.mark.parametrize("competing", [frozenset(), frozenset({"language.1"})], ids=["router", "competition"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_memory_and_flops_agree_with_a_real_step(moe: Any, competing: frozenset[str], checkpointing: bool) -> None:
    if competing and moe is None:
        pytest.skip("a dense model has no competition")
    model = tiny("cpu", moe)
    model.routing.competing = competing
    if checkpointing:
        model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, pixels = token_ids(model), torch.randn(2, 3, 28, 28)
    states = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with LiveBytes(states) as live:
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    cost = simulate(tiny("meta", moe), 2, 256, 2, competing)
    assert cost.activations(checkpointing) == pytest.approx(live.peak, rel=0.15)
    assert cost.step_flops(checkpointing) == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize(
    "layer",
    [
        {"router": "tc_moe"},
        {"router": "moe_plus_plus"},
        {"router": "autonomy"},
        {"router": "autonomy", "autonomy_rank": 8},
        {"router": "softmax", "coupling_coef": 1.0, "num_experts": 16},
    ],
    ids=["tc_moe", "moe_plus_plus", "autonomy", "autonomy of low rank", "coupled"],
)
def test_other_routers_agree_with_a_real_step(layer: dict[str, Any]) -> None:
    """MoE++ runs fewer experts than are planned for: how many run nothing depends on values."""
    model, planned = tiny("cpu", {"language": layer}), tiny("meta", {"language": layer})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, pixels = token_ids(model), torch.randn(2, 3, 28, 28)
    states = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with LiveBytes(states) as live, FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    cost = simulate(planned, 2, 256, 2, frozenset())
    assert cost.activations(checkpointing=False) == pytest.approx(live.peak, rel=0.2)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    if "coupling_coef" in layer:  # which takes three products of 16 proxies with 16 experts' gates in each layer
        plain = simulate(tiny("meta", {"language": {**layer, "coupling_coef": None}}), 2, 256, 2, frozenset())
        block = next(iter(moe_blocks(model).values()))
        products = 2 * 16 * 16 * block.experts.down_proj.shape[2] * block.hidden_size
        assert cost.flops - plain.flops == 3 * products * len(moe_blocks(model))


@pytest.mark.parametrize("rule", [{"competition_margin": 0.0}, {"competition_answers": "mean"}], ids=["full", "mean"])
def test_what_the_losss_judgement_keeps_and_costs_agrees_with_a_real_step(rule: dict[str, Any]) -> None:
    moe = {"language": {"competition_judge": "loss", **rule}}
    model = tiny("cpu", moe, layers=6)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, pixels = token_ids(model), torch.randn(2, 3, 28, 28)
    states = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with LiveBytes(states) as live, FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    cost, plain = (simulate(tiny("meta", each, layers=6), 2, 256, 2, frozenset()) for each in (moe, {"language": {}}))
    assert cost.activations(checkpointing=False) == pytest.approx(live.peak, rel=0.15)
    assert cost.flops == plain.flops
    assert (cost.asking_flops > 0) == ("competition_margin" in rule)
    assert cost.flops + cost.asking_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_judgement_keeps_logits_and_outputs_in_bfloat16() -> None:
    """Counted by the same hooks around real layers: what is kept beyond a step that nobody judges."""
    kept = []
    for rule in ({"competition_rate": 0.0}, {"competition_baseline": "none"}, {}):
        moe = {"language": {"competition_judge": "loss", **rule}}
        model = tiny("cpu", moe).bfloat16()
        recorder, ids = _Recorder(model, FlopCounterMode(display=False)), token_ids(model)
        with recorder:
            model(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28).bfloat16(), labels=ids)
        planned = simulate(tiny("meta", moe).bfloat16(), 2, 256, 2, frozenset())
        kept.append([sum(found.layer_bytes.values()) for found in (recorder, planned)])
    plain, bare, whole = kept
    # Four layers, 512 tokens, 4 experts in four bytes; outputs of width 128 in two where they are the baseline. The
    # tokens are those that the router keeps.
    assert [now - before for now, before in zip(bare, plain, strict=True)] == [4 * 512 * 4 * 4] * 2
    assert [now - before for now, before in zip(whole, bare, strict=True)] == [4 * 512 * 128 * 2] * 2


@pytest.mark.parametrize("keeps", ["everything", "pre_activations", "input"])
def test_what_competitions_keep_agrees_with_a_real_step(keeps: str) -> None:
    layers = {"competition_keeps": keeps, "competition_chunk_tokens": None if keeps == "everything" else 64}
    competing = frozenset(f"language.{layer}" for layer in range(6))
    real, planned = (tiny(device, {"language": layers}, layers=6) for device in ("cpu", "meta"))
    real.routing.competing = competing
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, pixels = token_ids(real), torch.randn(2, 3, 28, 28)
    states = [tensor for parameter in real.parameters() for tensor in (parameter, parameter.grad)]
    with LiveBytes(states) as live:
        real(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    with FlopCounterMode(display=False) as counter:
        real(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    cost = simulate(planned, 2, 256, 2, competing)
    # What a chunk takes for a moment is not planned, and large at these widths.
    assert cost.activations(checkpointing=False) == pytest.approx(live.peak, rel=0.2)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_the_head_is_planned_where_a_label_may_be() -> None:
    """Three images in 64 tokens, and a vocabulary whose logits outweigh the layers."""
    model, _ = tiny_model(language={"vocab_size": 4096})
    ids = torch.randint(5, 200, (1, 64))
    ids[:, : 3 * model.config.num_image_tokens] = model.config.image_token_id
    labels = ids.masked_fill(ids == model.config.image_token_id, IGNORE_INDEX)
    with FlopCounterMode(display=False) as counter:
        options = {"labels": labels, "label_positions": label_positions(labels)}
        output = model(input_ids=ids, pixel_values=torch.randn(3, 3, 28, 28), **options)
        output.loss.backward()
    cost = simulate(model.to("meta"), 1, 64, 3, frozenset())
    assert cost.loss_bytes == 2 * output.logits.nbytes
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_checkpointed_steps_agree_with_real_ones(part: str) -> None:
    costs = []
    for device in ("cpu", "meta"):
        model = tiny(device, {part: {}})
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(PREFIXES[part]))
        if device == "meta":
            costs.append(simulate(model, 2, 256, 2, frozenset()).step_flops(checkpointing=True))
            continue
        model.activation_checkpointing_enable()
        ids = token_ids(model)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28), labels=ids).loss.backward()
        costs.append(counter.get_total_flops())
    assert costs[1] == pytest.approx(costs[0], rel=0.15)


def test_a_dense_model_of_a_family_without_a_row_is_planned() -> None:
    model, _ = tiny_model(language={"model_type": "helium", "head_dim": 8})
    cost = simulate(model.to("meta"), 1, 50, 1, frozenset())
    assert cost.activations(checkpointing=True) < cost.activations(checkpointing=False)


def test_model_states_agree_with_an_optimizer_step() -> None:
    model = tiny("cpu", None)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(5, 200, (2, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    state = state_memory(Weights(weight_bytes(model, None), 4 * count, 0, 0), torch.float32, 0, 1)
    assert state.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert state.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    measured = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values() if value.ndim)
    assert state.optimizer == measured


def test_demo_recipe_and_missing_checkpoint(tmp_path: Path) -> None:
    result = plan(CONFIGS / "demo" / "pretrain_align.yaml", [], Cluster(1, 2), 8)
    assert result.total.total == result.total.trainable
    assert result.recipe.config.text_config.vocab_size == 512  # that of the tokenizer which the stage will train
    assert result.largest_micro_batch[2]["with_checkpointing"] > 0
    path = tmp_path / "sft.yaml"
    section = ModelSection(checkpoint=tmp_path / "none")
    with pytest.raises(UserError, match=r"does not exist, and no recipe in .* writes it"):
        architecture(path, section)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: found 0, expected at least 1"),
        (["--gpu-memory", "-3"], "--gpu-memory: found -3, expected GiB above 0"),
        (["--json", "/no/such/file.json"], "--json: /no/such: no such directory"),
        (["moe.vision.num_experts=8"], "moe.vision.num_experts: found 8, the checkpoint has 4"),
        (["moe=false"], "has MoE blocks, but the config says moe: false"),
        (["trainable={vision: frozen}"], "trainable: no part is trained"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "phi35_siglip" / "sft.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_frozen_parts_are_not_trainable() -> None:
    path = CONFIGS / "vicuna7b_clip336" / "pretrain_align.yaml"
    assert read_yaml(path)["trainable"]["language"] == "frozen"
    parameters = plan(path, [], Cluster(1, 1), 80).parameters
    assert (parameters["vision"].trainable, parameters["language"].trainable) == (0, 0)
    assert parameters["projector"].trainable == parameters["projector"].total


def test_adapters_quantisation_and_offload() -> None:
    lora = ["trainable={language: {mode: lora, lora_rank: 4}}", "model.dtype=bfloat16"]
    path = CONFIGS / "demo" / "sft.yaml"
    adapted = plan(path, lora, Cluster(1, 1), 80)
    with_bits = plan(path, [*lora, "model.quantization=4bit"], Cluster(1, 1), 80)
    offloaded = plan(path, ["deepspeed=zero2_offload"], Cluster(1, 2), 80)
    base = build_on_meta(read_recipe(path, []))
    head = base.get_output_embeddings()
    matrices = [(1, m.weight) for m in base.language_model.modules() if isinstance(m, nn.Linear) and m is not head]
    linear = sum(weight.numel() for _, weight in matrices)
    for module in base.modules():
        if isinstance(module, PackedExperts):
            matrices += [(module.num_experts, parameter) for parameter in module.parameters()]
    routers = sum(p.numel() for block in moe_blocks(base).values() for p in block.router.parameters())
    assert adapted.total.trainable == routers + sum(4 * count * sum(matrix.shape[-2:]) for count, matrix in matrices)
    assert adapted.states[0].weights - with_bits.states[0].weights == pytest.approx(linear * (2 - 0.52), rel=1e-3)
    assert (offloaded.states[2].gradients, offloaded.states[2].optimizer) == (0, 0)
    assert offloaded.states[1].optimizer > 0
