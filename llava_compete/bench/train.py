"""What routing and competition cost in whole training steps: dense, softmax and competition, side by side.

The three models have the same shape and data; the dense one has the active parameters of the others (its MLPs are K
experts wide). A competition step is timed for each number of competing layers of a part; the overhead over a run
follows from how often the schedule (CompeteSMoE, section 3.3) has that number. On a CPU steps of the three alternate,
so that a slow moment of the machine meets all of them; on a GPU, which runs nothing else, one model at a time has the
memory. Medians are compared. Peak memory is what tensors hold: the caching allocator's on CUDA, counted on a CPU.

A step is what a training step is: micro-batches, then AdamW on float32 copies of bfloat16 weights.
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
from llava_compete.data.collator import label_positions
from llava_compete.errors import UserError
from llava_compete.model.config import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.parts import IGNORE_INDEX
from llava_compete.plan.step_cost import simulate
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
    """A model: `intermediate` is one expert's width; rows × length tokens a micro-batch, image tokens among them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    dtype: str
    tower: Tower | None = None
    name: str = "small model"
    key_value_heads: int | None = None
    expert_parts: tuple[str, ...] = ("language",)
    micro_batches: int = 1


# Sized so that the MLPs dominate, as in real models (there about two thirds of the arithmetic).
CPU_SHAPE = Shape(256, 1024, 4, 4, 512, 8, 256, "float32")

# The paper's models, whole: Phi-3.5-mini and SigLIP so400m at 384 pixels, which it gives experts in the tower.
SIGLIP = Tower(378, 14, 1152, 4304, 72, 27)
PAPER = Shape(3072, 8192, 32, 32, 32064, 4, 2048, "bfloat16", SIGLIP, "Phi-3.5-mini + SigLIP so400m", 32, ("vision",))
# LLaVA's 128 rows a step on 8 GPUs are 16 on each; 4 rows at a time keep a GPU busy (with 1 it waits for its host).
GPU_SHAPE = PAPER._replace(rows=4, micro_batches=4, expert_parts=("vision", "language"))
# What an 80 GB card leaves beside CUDA's context and the allocator's slack.
GPU_LIMIT = 70 * 2**30
# bfloat16 weight and gradient, float32 copy, and AdamW's two moments.
BYTES_A_PARAMETER = 2 + 2 + 4 + 4 + 4


def fit(limit: int) -> Shape:
    """`GPU_SHAPE` with as many of its layers, and the same share of tower blocks, as train in `limit` bytes.

    On several GPUs the states are shared out and more layers fit beside these activations; on one the widths, the rows
    and the experts stay real and the depth gives way.

    Raises:
        UserError: not even one layer fits.
    """
    one, three = (_bytes_needed(_cut(GPU_SHAPE, layers)) for layers in (1, 3))
    layers = min(GPU_SHAPE.layers, 2 + (limit - one) * 2 // (three - one))  # tower blocks do not grow evenly
    while layers > 0 and _bytes_needed(_cut(GPU_SHAPE, layers)) > limit:
        layers -= 1
    if layers < 1:
        raise UserError(f"bench train: {limit / 2**30:.0f} GiB of GPU memory do not hold a layer of {GPU_SHAPE.name}")
    return _cut(GPU_SHAPE, layers)


def _cut(shape: Shape, layers: int) -> Shape:
    assert shape.tower is not None
    blocks = max(1, round(shape.tower.layers * layers / shape.layers))
    name = f"{layers} of {shape.layers} layers and {blocks} of {shape.tower.layers} blocks of {shape.name}"
    return shape._replace(layers=layers, tower=shape.tower._replace(layers=blocks), name=name)


def _bytes_needed(shape: Shape) -> int:
    """Parameters with their training state, and the activations of a micro-batch with a full competition."""
    model = build("competition", shape, torch.device("meta"))
    held = BYTES_A_PARAMETER * sum(parameter.numel() for parameter in model.parameters())
    competing = frozenset(list(moe_blocks(model))[-CAP:])
    row = simulate(model, 1, shape.length, 1, competing).activations(checkpointing=False)
    return held + shape.rows * row


def build(case: str, shape: Shape, device: torch.device) -> LlavaCompeteForConditionalGeneration:
    """A model with random weights for `case`."""
    moe, widening = None, CHOSEN if case == "dense" else 1
    if case != "dense":
        layer = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "router": case}
        moe = MoeConfig.model_validate(dict.fromkeys(shape.expert_parts, layer)).of_model()
    text_config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate * (widening if "language" in shape.expert_parts else 1),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
    )
    vision: dict[str, Any] = {}
    if shape.tower is not None:
        vision = {
            "vision_config": _vision_config(shape.tower, widening if "vision" in shape.expert_parts else 1),
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
    """One optimizer step as a function of the competing layers; returns seconds."""
    optimizer = _Optimizer(list(model.parameters()))
    ids = torch.randint(1, shape.vocabulary, (shape.rows, shape.length), device=device)
    batch: dict[str, Any] = {"input_ids": ids, "right_padded": True}
    labels = ids
    if shape.tower is not None:
        labels = ids.clone()
        ids[:, : shape.tower.num_patches] = model.config.image_token_id
        labels[:, : shape.tower.num_patches] = IGNORE_INDEX
        batch["label_positions"] = label_positions(labels)
        side = shape.tower.image_size
        batch["pixel_values"] = torch.randn(shape.rows, 3, side, side, device=device, dtype=getattr(torch, shape.dtype))

    def step(competing: frozenset[str]) -> float:
        model.routing.competing = competing
        _synchronise(device)
        started = time.perf_counter()
        for _ in range(shape.micro_batches):
            model(**batch, labels=labels).loss.backward()
        optimizer.step()
        _synchronise(device)
        return time.perf_counter() - started

    return step


class _Optimizer:
    """Fused AdamW. Weights below float32 get a float32 copy that it updates, a GiB of gradients at a time, as a sharded
    optimizer does: the float32 gradients of all parameters never stand side by side."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.groups: list[list[tuple[torch.nn.Parameter, torch.Tensor]]] = [[]]
        size = 0
        for parameter in parameters:
            size += parameter.numel()
            if size > 2**28 and self.groups[-1]:
                self.groups.append([])
                size = parameter.numel()
            self.groups[-1].append((parameter, parameter.detach().float()))  # itself, if float32 already
        self.adamw = [torch.optim.AdamW([copy for _, copy in group], lr=1e-4, fused=True) for group in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, adamw in zip(self.groups, self.adamw, strict=True):
            for parameter, copy in group:
                copy.grad = None if parameter.grad is None else parameter.grad.float()
            adamw.step()
            for parameter, copy in group:
                if parameter.dtype != copy.dtype:  # else it is the parameter itself
                    parameter.copy_(copy)
                copy.grad = parameter.grad = None


def run_bench(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure all cases; seconds are medians of `repeats` steps.

    "competition/vision.3" in `seconds` is a competition step in which three tower layers compete.
    """
    on_gpu = device.type == "cuda"
    taken = [_alternate((case,), shape, device, repeats) for case in CASES] if on_gpu else []
    if not on_gpu:
        memory = {case: _counted_peak_mb(case, shape, device) for case in CASES}
        taken = [_alternate(CASES, shape, device, repeats)._replace(peak_mb=memory)]
    times = {key: seconds for measured in taken for key, seconds in measured.seconds.items()}
    router_step = times["competition/0"]
    layers = taken[-1].layers
    competing = competing_layers(layers)
    average = router_step + sum(
        share * (times[f"competition/{part}.{count}"] - router_step)
        for part, shares in competing.items()
        for count, share in shares.items()
    )
    seconds_of = {"dense": times["dense"], "softmax": times["softmax"], "competition": average}
    rows = shape.micro_batches * shape.rows
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "shape": {**shape._asdict(), "tower": shape.tower and shape.tower._asdict()},
        "parameters": {case: count for measured in taken for case, count in measured.parameters.items()},
        "seconds": times,
        "tokens_per_second": {case: rows * shape.length / seconds for case, seconds in seconds_of.items()},
        "peak_mb": {case: peak for measured in taken for case, peak in measured.peak_mb.items()},
        "competing_layers": competing,
        "competition_over_softmax": average / times["softmax"] - 1,
        "competition_over_own_router_step": average / router_step - 1,
        "softmax_over_dense": times["softmax"] / times["dense"] - 1,
        "layers": len(layers),
    }
    peak = device_peak(device)
    if peak is not None:
        result["mfu"] = _utilisation(shape, peak, seconds_of)
    return result


def _utilisation(shape: Shape, peak: float, seconds_of: dict[str, float]) -> dict[str, float]:
    """MFU by case; what a competition adds does not count as needed."""
    meta, rows = torch.device("meta"), shape.micro_batches * shape.rows
    flops = {case: count_flops(build(case, shape, meta), shape.length) for case in ("dense", "softmax")}
    flops["competition"] = flops["softmax"]
    images, image_tokens = (0, 0) if shape.tower is None else (rows, rows * shape.tower.num_patches)
    tokens = rows * shape.length
    return {
        case: Utilisation(flops[case], peak, 1).mfu(tokens, tokens - image_tokens, images, seconds)
        for case, seconds in seconds_of.items()
    }


def competing_layers(names: Sequence[str]) -> dict[str, dict[int, float]]:
    """For each part, the share of steps in which 1, 2, ... of its layers compete: a long run at the default rates."""
    schedule = CompetitionSchedule.build(0, SCHEDULE_STEPS, names, RATE, 0.0, CAP)
    counts: dict[str, Counter[int]] = {part: Counter() for part in map(_part, names)}
    for step in range(SCHEDULE_STEPS):
        for part, count in Counter(map(_part, schedule.layers_at(step))).items():
            counts[part][count] += 1
    return {part: {n: of[n] / SCHEDULE_STEPS for n in sorted(of)} for part, of in counts.items()}


class _Measured(NamedTuple):
    """Median seconds by kind of step, and by case the parameters and the peak of memory; `layers` may compete."""

    seconds: dict[str, float]
    layers: list[str]
    parameters: dict[str, int]
    peak_mb: dict[str, float]


def _alternate(cases: Sequence[str], shape: Shape, device: torch.device, repeats: int) -> _Measured:
    """All kinds of steps of these cases take turns; the peak is that of all cases together, on a GPU alone."""
    _reset_peak(device)
    models = {case: build(case, shape, device) for case in cases}
    steps = {case: make_step(model, shape, device) for case, model in models.items()}
    plan: dict[str, tuple[str, frozenset[str]]] = {case: (case, frozenset()) for case in cases if case != "competition"}
    names = list(moe_blocks(models["competition"])) if "competition" in models else []
    if names:
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
    parameters = {case: sum(p.numel() for p in model.parameters()) for case, model in models.items()}
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return _Measured(medians, names, parameters, dict.fromkeys(cases, peak))


def _part(name: str) -> str:
    return name.split(".")[0]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _counted_peak_mb(case: str, shape: Shape, device: torch.device) -> float:
    """Peak of two steps (with competition in as many layers as one step may have)."""
    with LiveBytes() as live:
        model = build(case, shape, device)
        step = make_step(model, shape, device)
        for _ in range(2):
            step(frozenset(list(moe_blocks(model))[-CAP:]))  # of the language model, the last part
    return live.peak / 2**20


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
