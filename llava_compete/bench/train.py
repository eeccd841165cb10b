"""What routing and competition cost in whole training steps: dense, softmax and competition, side by side.

The three models have the same shape and data; the dense one has the active parameters of the others (its MLPs are K
experts wide). Steps of the three alternate, so that a slow moment of the machine meets all of them, and medians are
compared. A competition step is timed for each number of competing layers of a part; the overhead over a run follows
from how often the schedule (CompeteSMoE, section 3.3) has that number.
Peak memory is what tensors hold: the caching allocator's on CUDA, counted on CPU.

Caller: `llava-compete bench train`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from llava_compete.bench.memory import LiveBytes
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train.mfu import Utilisation, count_flops, device_peak
from llava_compete.vision.tower_config import PreprocessConfig, TowerConfig

CASES = ("dense", "softmax", "competition")
EXPERTS, CHOSEN = 4, 2
RATE, CAP = 0.05, 3
SCHEDULE_STEPS = 10_000


class Tower(NamedTuple):
    """A ViT before the language model, one image a row; `intermediate` is one expert's width."""

    image_size: int
    patch_size: int
    width: int
    intermediate: int
    head_width: int
    layers: int

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Shape(NamedTuple):
    """A model: `intermediate` is one expert's width; rows × length tokens a step, those of the images included."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    dtype: str
    tower: Tower | None = None


# Sized so that the MLPs dominate, as in real models (there about two thirds of the arithmetic).
CPU_SHAPE = Shape(256, 1024, 4, 4, 512, 8, 256, "float32")
# SigLIP so400m (384 pixels) and Phi-3.5-mini, whole; `fit` cuts both down to what fits.
SIGLIP = Tower(378, 14, 1152, 4304, 72, 27)
GPU_SHAPE = Shape(3072, 8192, 32, 32, 32064, 4, 2048, "bfloat16", SIGLIP)


def fit(shape: Shape, free_bytes: int) -> Shape:
    """The shape with as many layers, and the same share of tower blocks, as leave a third of the memory of one MoE
    model for activations (a parameter, its gradient and Adam's two moments in the shape's dtype)."""
    language = EXPERTS * 3 * shape.hidden * shape.intermediate + 4 * shape.hidden**2
    share, block = 0.0, 0
    if shape.tower is not None:
        share = shape.tower.layers / shape.layers
        block = EXPERTS * 2 * shape.tower.width * shape.tower.intermediate + 4 * shape.tower.width**2
    parameter_bytes = 4 * getattr(torch, shape.dtype).itemsize
    room = free_bytes * 2 / 3 / parameter_bytes - 2 * shape.vocabulary * shape.hidden
    layers = min(shape.layers, max(1, int(room / (language + share * block))))
    tower = shape.tower and shape.tower._replace(layers=max(1, round(share * layers)))
    return shape._replace(layers=layers, tower=tower)


def build(case: str, shape: Shape, device: torch.device) -> LlavaCompeteForConditionalGeneration:
    """A model with random weights for `case`."""
    moe, widening = None, CHOSEN if case == "dense" else 1
    if case != "dense":
        layer = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "router": case}
        parts = ["language"] if shape.tower is None else ["vision", "language"]
        moe = MoeConfig.model_validate(dict.fromkeys(parts, layer)).model_dump(mode="json")
    text_config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate * widening,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2 * shape.length,  # operations are counted at both lengths
    )
    vision: dict[str, Any] = {}
    if shape.tower is not None:
        vision = {
            "vision_config": _vision_config(shape.tower, widening),
            "projector_config": {"type": "mlp2x_gelu"},
            "image_token_id": 0,
        }
    config = LlavaCompeteConfig(text_config=text_config, moe=moe, **vision)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaCompeteForConditionalGeneration(config).to(getattr(torch, shape.dtype)).train()


def _vision_config(tower: Tower, widening: int) -> dict[str, Any]:
    vision_cfg = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "width": tower.width,
        "layers": tower.layers,
        "head_width": tower.head_width,
        # open_clip rounds down what it multiplies
        "mlp_ratio": (tower.intermediate * widening + 0.5) / tower.width,
    }
    return TowerConfig(
        embed_dim=tower.width,
        vision_cfg=vision_cfg,
        feature_layer=-1,
        preprocess=PreprocessConfig(size=tower.image_size),
        width=tower.width,
        num_tokens=tower.num_patches,
        num_layers=tower.layers,
    ).model_dump(mode="json")


def make_step(
    model: LlavaCompeteForConditionalGeneration, shape: Shape, device: torch.device
) -> Callable[[frozenset[str]], float]:
    """One optimizer step (AdamW, fused) as a function of the competing layers; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.length), device=device)
    batch, labels = {"input_ids": ids}, ids
    if shape.tower is not None:
        labels = ids.clone()
        ids[:, : shape.tower.num_patches] = model.config.image_token_id
        labels[:, : shape.tower.num_patches] = -100
        side = shape.tower.image_size
        batch["pixel_values"] = torch.randn(shape.rows, 3, side, side, device=device, dtype=getattr(torch, shape.dtype))

    def step(competing: frozenset[str]) -> float:
        model.routing.competing = competing
        _synchronise(device)
        started = time.perf_counter()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(device)
        return time.perf_counter() - started

    return step


def run_bench(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure all cases; seconds are medians of `repeats` steps.

    "competition/vision.3" in `seconds` is a competition step in which three tower layers compete.
    """
    memory = {case: _peak_mb(case, shape, device) for case in CASES}
    times, layers, flops = _alternate(shape, device, repeats)
    tokens, images = shape.rows * shape.length, 0 if shape.tower is None else shape.rows
    router_step = times["competition/0"]
    competing = competing_layers(layers)
    average = router_step + sum(
        share * (times[f"competition/{part}.{count}"] - router_step)
        for part, shares in competing.items()
        for count, share in shares.items()
    )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "shape": {**shape._asdict(), "tower": shape.tower and shape.tower._asdict()},
        "seconds": times,
        "tokens_per_second": {
            "dense": tokens / times["dense"],
            "softmax": tokens / times["softmax"],
            "competition": tokens / average,
        },
        "peak_mb": memory,
        "competing_layers": competing,
        "competition_over_softmax": average / times["softmax"] - 1,
        "competition_over_own_router_step": average / router_step - 1,
        "softmax_over_dense": times["softmax"] / times["dense"] - 1,
        "layers": len(layers),
    }
    peak = device_peak(device)
    if peak is not None:
        result["mfu"] = {
            case: Utilisation(flops[case], peak, 1).mfu(tokens, images, times[key])
            for case, key in (("dense", "dense"), ("softmax", "softmax"), ("competition", "competition/0"))
        }
    return result


def competing_layers(names: Sequence[str]) -> dict[str, dict[int, float]]:
    """For each part, the share of steps in which 1, 2, ... of its layers compete: a long run at the default rates."""
    schedule = CompetitionSchedule.build(0, SCHEDULE_STEPS, names, RATE, 0.0, CAP)
    counts: dict[str, Counter[int]] = {part: Counter() for part in map(_part, names)}
    for step in range(SCHEDULE_STEPS):
        for part, count in Counter(map(_part, schedule.layers_at(step))).items():
            counts[part][count] += 1
    return {part: {n: of[n] / SCHEDULE_STEPS for n in sorted(of)} for part, of in counts.items()}


def _alternate(shape: Shape, device: torch.device, repeats: int) -> tuple[dict[str, float], list[str], dict[str, Any]]:
    models = {case: build(case, shape, device) for case in CASES}
    flops = {case: count_flops(model, shape.length) for case, model in models.items()} if device.type == "cuda" else {}
    steps = {case: make_step(model, shape, device) for case, model in models.items()}
    names = list(moe_blocks(models["competition"]))
    plan: dict[str, tuple[str, frozenset[str]]] = {case: (case, frozenset()) for case in CASES[:2]}
    plan["competition/0"] = ("competition", frozenset())
    for part in dict.fromkeys(map(_part, names)):
        competing = [name for name in names if _part(name) == part][:CAP]
        for count in range(1, len(competing) + 1):
            plan[f"competition/{part}.{count}"] = ("competition", frozenset(competing[:count]))
    seconds: dict[str, list[float]] = {key: [] for key in plan}
    for repeat in range(repeats + 1):
        for key, (case, competing_names) in plan.items():
            taken = steps[case](competing_names)
            if repeat:  # the first round warms up
                seconds[key].append(taken)
    return {key: statistics.median(values) for key, values in seconds.items()}, names, flops


def _part(name: str) -> str:
    return name.split(".")[0]


def _peak_mb(case: str, shape: Shape, device: torch.device) -> float:
    """Peak of two steps (with competition in as many layers as one step may have)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _two_steps(case, shape, device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        gc.collect()
        torch.cuda.empty_cache()
        return peak
    with LiveBytes() as live:
        _two_steps(case, shape, device)
    return live.peak / 2**20


def _two_steps(case: str, shape: Shape, device: torch.device) -> None:
    model = build(case, shape, device)
    step = make_step(model, shape, device)
    for _ in range(2):
        step(frozenset(list(moe_blocks(model))[-CAP:]))  # of the language model, the last part


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
