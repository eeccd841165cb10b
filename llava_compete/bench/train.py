"""What routing and competition cost in whole training steps: dense, softmax and competition, side by side.

The three models have the same shape and data; the dense one has the active parameters of the others (its MLP is K
experts wide). Steps of the three alternate, so that a slow moment of the machine meets all of them, and medians are
compared. A competition step is timed for each number of competing layers; the overhead over a run follows from how
often the schedule (CompeteSMoE, section 3.3) has that number. Memory is measured in a fresh process for each case.

Caller: `llava-compete bench train`.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from llava_compete.model.configuration import LlavaCompeteConfig
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.moe.config import MoeConfig
from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.train.throughput import count_flops, device_peak, mfu

CASES = ("dense", "softmax", "competition")
EXPERTS, CHOSEN = 4, 2
RATE, CAP = 0.05, 3
SCHEDULE_STEPS = 10_000


class Shape(NamedTuple):
    """A text model: `intermediate` is one expert's width; rows × length tokens a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    dtype: str


# Sized so that the MLPs dominate, as in real models (there about two thirds of the arithmetic).
CPU_SHAPE = Shape(256, 1024, 4, 4, 512, 8, 256, "float32")
# Phi-3.5-mini's layers; their number is what fits (see `fit_layers`).
GPU_SHAPE = Shape(3072, 8192, 0, 32, 32064, 8, 2048, "bfloat16")


def fit_layers(shape: Shape, free_bytes: int) -> int:
    """Layers of the MoE model that leave a third of the memory for activations (Adam: 16 bytes a parameter)."""
    experts = EXPERTS * 3 * shape.hidden * shape.intermediate
    attention = 4 * shape.hidden * shape.hidden
    embeddings = 2 * shape.vocabulary * shape.hidden
    return max(1, int((free_bytes * 2 / 3 / 16 - embeddings) / (experts + attention)))


def build(case: str, shape: Shape, device: torch.device) -> LlavaCompeteForConditionalGeneration:
    """A model with random weights for `case`."""
    moe = None
    if case != "dense":
        layer = {"num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "router": case}
        moe = MoeConfig.model_validate({"language": layer}).model_dump(mode="json")
    text_config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate * (CHOSEN if case == "dense" else 1),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
    )
    config = LlavaCompeteConfig(text_config=text_config, moe=moe)
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaCompeteForConditionalGeneration(config).to(getattr(torch, shape.dtype)).train()


def make_step(
    model: LlavaCompeteForConditionalGeneration, shape: Shape, device: torch.device
) -> Callable[[frozenset[str]], float]:
    """One optimizer step (AdamW, fused) as a function of the competing layers; returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), device=device)

    def step(competing: frozenset[str]) -> float:
        model.routing.competing = competing
        _synchronise(device)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(device)
        return time.perf_counter() - started

    return step


def run_bench(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure all cases; seconds are medians of `repeats` steps."""
    memory = {case: _peak_mb(case, shape, device) for case in CASES}
    times, layers, flops = _alternate(shape, device, repeats)
    tokens = shape.rows * shape.length
    router_step = times["competition/0"]
    share = competing_share(shape.layers)
    average = sum(part * times[f"competition/{count}"] for count, part in share.items())
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "shape": shape._asdict(),
        "seconds": times,
        "tokens_per_second": {
            "dense": tokens / times["dense"],
            "softmax": tokens / times["softmax"],
            "competition": tokens / average,
        },
        "peak_mb": memory,
        "competing_layers_share": {str(count): part for count, part in share.items()},
        "competition_over_softmax": average / times["softmax"] - 1,
        "competition_over_own_router_step": average / router_step - 1,
        "softmax_over_dense": times["softmax"] / times["dense"] - 1,
        "layers": layers,
    }
    peak = device_peak(device)
    if peak is not None:
        result["mfu"] = {
            case: mfu(flops[case], tokens, 0, times[key], peak, 1)
            for case, key in (("dense", "dense"), ("softmax", "softmax"), ("competition", "competition/0"))
        }
    return result


def competing_share(num_layers: int) -> dict[int, float]:
    """Share of steps with each number of competing layers, from the schedule of a long run at the default rates."""
    names = [f"language.{layer}" for layer in range(num_layers)]
    schedule = CompetitionSchedule.build(0, SCHEDULE_STEPS, names, RATE, 0.0, CAP)
    counts = Counter(len(schedule.layers_at(step)) for step in range(SCHEDULE_STEPS))
    return {count: counts[count] / SCHEDULE_STEPS for count in sorted(counts)}


def _alternate(shape: Shape, device: torch.device, repeats: int) -> tuple[dict[str, float], int, dict[str, Any]]:
    models = {case: build(case, shape, device) for case in CASES}
    flops = {case: count_flops(model, shape.length) for case, model in models.items()} if device.type == "cuda" else {}
    steps = {case: make_step(model, shape, device) for case, model in models.items()}
    names = list(moe_blocks(models["competition"]))
    plan = [("dense", 0), ("softmax", 0), *(("competition", count) for count in range(min(CAP, len(names)) + 1))]
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for case, count in plan:
            taken = steps[case](frozenset(names[:count]))
            if repeat:  # the first round warms up
                seconds.setdefault(case if case != "competition" else f"{case}/{count}", []).append(taken)
    return {key: statistics.median(values) for key, values in seconds.items()}, len(names), flops


def _peak_mb(case: str, shape: Shape, device: torch.device) -> float:
    """Peak of two steps (with competition in as many layers as one step may have)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _two_steps(case, shape, device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        gc.collect()
        torch.cuda.empty_cache()
        return peak
    # Resident memory never shrinks in a process, so each case has its own.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(case, shape, device, sender))
    child.start()
    peak = receiver.recv()
    child.join()
    return float(peak)


def _report_peak(case: str, shape: Shape, device: torch.device, sender: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _two_steps(case, shape, device)
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


def _two_steps(case: str, shape: Shape, device: torch.device) -> None:
    model = build(case, shape, device)
    step = make_step(model, shape, device)
    for _ in range(2):
        step(frozenset(list(moe_blocks(model))[:CAP]))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
