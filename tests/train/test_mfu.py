"""Counted operations, tokens/s of the training benchmark: same active parameters, same data, its schedule's average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import backward, fake_gpu, move_to_fake_gpu
from tiny import TOWER, tiny_model

from llava_compete.bench import train as bench
from llava_compete.cli import main
from llava_compete.errors import UserError
from llava_compete.moe.block import moe_blocks
from llava_compete.train.adapters import with_adapters
from llava_compete.train.config import PartTraining
from llava_compete.train.mfu import Utilisation, count_flops, device_peak

SHAPE = bench.Shape(16, 32, 2, 2, 64, 2, 16, "float32")
SEEING = SHAPE._replace(tower=bench.Tower(8, 4, 12, 24, 6, 3), expert_parts=("vision", "language"))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 NVL", 835), ("NVIDIA T4", None)],
)
def test_cards_of_one_name_have_their_own_peaks(name: str, tera: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device_peak(torch.device("cuda")) == (None if tera is None else tera * 1e12)


def test_operations_are_six_a_parameter_and_token_and_four_where_frozen() -> None:
    model, _ = tiny_model(tower=None, language={"hidden_size": 256, "intermediate_size": 512, "vocab_size": 64})
    used = sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name)
    trained = count_flops(model, 32)
    assert trained.per_token == pytest.approx(6 * used, rel=0.15)
    assert trained.per_image == 0
    lora = {"language": PartTraining(mode="lora", lora_rank=2)}
    frozen = count_flops(with_adapters(model, lora).get_base_model(), 32, lora)  # type: ignore[arg-type]
    assert frozen.per_token == pytest.approx(4 * used, rel=0.15)
    utilisation = Utilisation(trained, peak=trained.per_token * 1000, devices=2)
    assert utilisation.mfu(1000, 0, 0, seconds=2.0) == pytest.approx(0.25)
    head = model.get_output_embeddings().weight.numel()
    assert trained.per_label == 6 * head
    assert frozen.per_label == 4 * head


def test_operations_of_images_and_of_chosen_experts_alone_count() -> None:
    moe = {part: {"num_experts": 4, "num_experts_per_tok": 2} for part in ("vision", "projector", "language")}
    wide = {"embed_dim": 96, "vision_cfg": {**TOWER["vision_cfg"], "width": 96, "mlp_ratio": 4.0}}
    model, _ = tiny_model(moe, tower=wide, language={"hidden_size": 96, "intermediate_size": 256, "vocab_size": 64})
    active = {"language": 0, "image": 0}
    for name, parameter in model.named_parameters():
        if "embed" not in name and "lm_head" not in name:
            part = "language" if name.startswith("model.language_model.") else "image"
            active[part] += parameter.numel() // (2 if ".experts." in name else 1)
    found = count_flops(model, 16)
    assert found.per_token == pytest.approx(6 * active["language"], rel=0.15)
    assert found.per_image == pytest.approx(6 * active["image"] * model.config.num_image_tokens, rel=0.15)
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad_(False)
    frozen = count_flops(model, 16)
    assert frozen.per_token == found.per_token
    assert frozen.per_image < 0.6 * found.per_image


def test_counting_needs_no_room_beyond_the_context() -> None:
    model, _ = tiny_model(tower=None)
    assert count_flops(model, model.config.text_config.max_position_embeddings).per_token > 0


@pytest.mark.parametrize("shape", [SHAPE, SEEING])
def test_dense_and_mixtures_have_the_same_active_parameters(shape: bench.Shape) -> None:
    counts = {}
    for case in bench.CASES:
        model = bench.build(case, shape, CPU)
        total = sum(parameter.numel() for parameter in model.parameters())
        for block in moe_blocks(model).values():
            experts, router = (sum(p.numel() for p in part.parameters()) for part in (block.experts, block.router))
            total -= experts * (bench.EXPERTS - bench.CHOSEN) // bench.EXPERTS + router
            if block.part == "vision":  # K output biases a token where the dense block has one
                total -= bench.CHOSEN * 12 - 12
        counts[case] = total
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("layers", [1, 4, 32])
def test_competing_layers_come_from_the_schedule(layers: int) -> None:
    names = [f"vision.{layer}" for layer in range(3)] + [f"language.{layer}" for layer in range(layers)]
    competing = bench.competing_layers(names)
    for part, number in (("vision", 3), ("language", layers)):
        assert sum(count * share for count, share in competing[part].items()) == pytest.approx(
            number * bench.RATE, rel=0.1
        )
        assert set(competing[part]) <= {1, 2, 3}


def test_the_gpu_shape_is_the_papers_models_with_as_many_layers_as_fit_stepped_on_the_meta_device() -> None:
    paper = bench.build("competition", bench.PAPER, torch.device("meta"))
    assert sum(parameter.numel() for parameter in paper.parameters()) == pytest.approx(5.1e9, rel=0.03)
    shape = bench.fit(bench.GPU_LIMIT)
    assert shape.tower is not None
    assert shape.tower.layers / shape.layers == pytest.approx(27 / 32, abs=0.06)
    assert shape[:2] + shape.tower[:5] == bench.GPU_SHAPE[:2] + bench.SIGLIP[:5]  # only the depths are less
    assert shape.name == (
        f"{shape.layers} of 32 layers and {shape.tower.layers} of 27 blocks of Phi-3.5-mini + SigLIP so400m"
    )
    needed, more = (bench._bytes_needed(bench._cut(bench.GPU_SHAPE, shape.layers + extra)) for extra in (0, 1))
    assert needed <= bench.GPU_LIMIT < more
    with pytest.raises(UserError, match=r"1 GiB of GPU memory do not hold a layer of Phi-3\.5-mini"):
        bench.fit(2**30)


@pytest.mark.parametrize("case", bench.CASES)
def test_a_step_of_the_gpu_shape_runs_on_a_gpu_that_is_not_there(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its real widths, rows and length, with two layers: batch, micro-batches and optimizer."""
    shape = bench._cut(bench.GPU_SHAPE, 2)
    assert shape.tower is not None
    labelled = shape.rows * (shape.length - shape.tower.num_patches)
    model = bench.build(case, shape, torch.device("meta"))
    competing = frozenset(moe_blocks(model)) if case == "competition" else frozenset()
    logits: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda *call: logits.append(call[2].shape))
    for name, value in (("get_device_capability", (9, 0)), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake_gpu():
        # The search looks at values, once before the first step.
        positions = torch.zeros(labelled, dtype=torch.long, device="cuda")
        monkeypatch.setattr(bench, "label_positions", lambda _: positions)
        move_to_fake_gpu(model)
        assert bench.make_step(model, shape, torch.device("cuda"))(competing) > 0
    assert logits == [(1, labelled, shape.vocabulary)] * shape.micro_batches


def test_operations_of_the_gpu_shape_are_counted_in_every_case() -> None:
    shape = bench._cut(bench.GPU_SHAPE, 2)
    same = bench._utilisation(shape, 1e12, dict.fromkeys(bench.CASES, 1.0))
    assert same["softmax"] == same["competition"] == pytest.approx(same["dense"], rel=0.01)


def test_models_are_also_measured_one_at_a_time_in_half_precision() -> None:
    shape = SEEING._replace(dtype="bfloat16", micro_batches=2)
    dense = bench._alternate(("dense",), shape, CPU, 1)
    assert set(dense.seconds) == {"dense"}
    competition = bench._alternate(("competition",), shape, CPU, 1)
    assert {"competition/0", "competition/vision.3", "competition/language.2"} <= set(competition.seconds)
    assert competition.parameters["competition"] > dense.parameters["dense"]


def test_half_precision_weights_follow_float32_copies() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(4))
    ours, plain = bench._Optimizer([weight]), torch.optim.AdamW([exact], lr=1e-4)
    for _ in range(40):  # each step is far below bfloat16's spacing of 1/128 at 1
        weight.grad, exact.grad = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
        ours.step()
        plain.step()
    torch.testing.assert_close(ours.groups[0][0][1], exact.detach())
    torch.testing.assert_close(weight.detach(), exact.detach().bfloat16())
    assert float(weight.detach()[0]) < 1


@pytest.mark.parametrize("shape", [SHAPE, SEEING])
def test_the_command_prints_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: bench.Shape
) -> None:
    monkeypatch.setattr(bench, "CPU_SHAPE", shape)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "train", "--repeats", "2", "--json", str(tmp_path / "new" / "result.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    seconds, competing = found["seconds"], found["competing_layers"]
    steps = {"language": 2} | ({"vision": 3} if shape.tower else {})
    keys = {f"competition/{part}.{count + 1}" for part, most in steps.items() for count in range(most)}
    assert set(seconds) == {"dense", "softmax", "competition/0", *keys}
    assert competing.keys() == steps.keys()
    average = seconds["competition/0"]
    for part, shares in competing.items():
        for count, share in shares.items():
            average += share * (seconds[f"competition/{part}.{count}"] - seconds["competition/0"])
    assert found["competition_over_softmax"] == pytest.approx(average / seconds["softmax"] - 1)
    assert found["softmax_over_dense"] == pytest.approx(seconds["softmax"] / seconds["dense"] - 1)
    assert set(found["tokens_per_second"]) == set(found["peak_mb"]) == set(bench.CASES)
    printed = capsys.readouterr().out
    assert f"competition over softmax  {found['competition_over_softmax']:+.1%}  (aim: at most 5%)" in printed
