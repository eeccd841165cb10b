"""Time and peak memory of an MoE block's forward and backward beside floors measured in the same run.

The floors are K and E dense MLPs on the same tokens: what the arithmetic alone costs. On gated shapes transformers' own
block takes part, with the same width, experts and tokens. All cases of a shape take turns
within each round, so that a busy machine slows them alike. Peak memory is what tensors hold (parameters, gradients and
activations of the block): the caching allocator's on CUDA, a count over every operator's outputs on CPU.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_compete import files
from llava_compete.bench.memory import LiveBytes
from llava_compete.moe.block import SparseMoeBlock
from llava_compete.moe.layer_config import MoeLayerConfig
from llava_compete.moe.state import RoutingState, TokenGroups
from llava_compete.moe.terms import ROUTERS

NAME = "language.0"
COMPETITION = "competition_step"
RECOMPUTED, PRE_ACTIVATIONS = f"{COMPETITION}_recompute", f"{COMPETITION}_pre_activations"
# A router step beside which every expert responds; one whose backward asks every expert that was not chosen, or those
# whose probability comes near; and one where running means answer.
TAUGHT = "taught_step"
JUDGED: dict[str, dict[str, Any]] = {
    "judged_step_all": {"competition_margin": 0.0},
    "judged_step_margin": {"competition_margin": 0.8},
    "judged_step_next": {"competition_contenders": 1},
    "judged_step_means": {"competition_answers": "mean"},
}
# The softmax router with the expert-router coupling loss, which any other may have.
COUPLED = "coupled_step"
CASES = ("dense_k", "dense_e", *ROUTERS, COUPLED, COMPETITION, RECOMPUTED, PRE_ACTIVATIONS, TAUGHT, *JUDGED)
# Tokens of a chunk: on a CPU a cache holds few, on a GPU more chunks cost more launches.
CHUNK_TOKENS = {"cpu": 256, "cuda": 4096}
STEPS_IN_A_ROW = 5
LONGEST_KERNELS = 12
# transformers' own block, on gated shapes: Mixtral's, with each kernel for it that this machine has.
TRANSFORMERS = "mixtral_"


class Shape(NamedTuple):
    """Sizes of a block; letters as in the papers."""

    D: int
    I: int  # noqa: E741 (the papers' letter)
    E: int
    K: int
    gated: bool = False

    def __str__(self) -> str:
        return f"D {self.D}, I {self.I}, E {self.E}, K {self.K}"


CPU_SHAPES = (Shape(256, 1024, 4, 2), Shape(512, 128, 64, 8), Shape(768, 3072, 4, 2))
# The last two: SigLIP so400m/14's MLP and Phi-3.5-mini's.
GPU_SHAPES = (*CPU_SHAPES[:2], Shape(1152, 4304, 4, 2), Shape(3072, 8192, 4, 2, gated=True))
# Starting and reading a profile takes longer than a step.
PROFILED = ("dense_k", "dense_e", "softmax", "shared_softmax", "xmoe", COMPETITION, RECOMPUTED, "mixtral_grouped_mm")


class Kernels(NamedTuple):
    """Of one step: time on the device (where it falls short of a step's, the host's launches are what is waited for),
    number of launches, and the longest kernels as [name, launches, ms]."""

    ms: float
    launches: int
    longest: list[tuple[str, int, float]]


@dataclass(frozen=True)
class Row:
    """One case of one shape; `ratio` is to `floor(case)`. `kernels`: on CUDA, what ran on the device in one step.
    `asked`: the share of the experts not chosen that a token asked, where the loss judges."""

    shape: Shape
    tokens: int
    case: str
    ms: float
    peak_mb: float
    ratio: float
    kernels: Kernels | None = None
    asked: float | None = None

    def to_json(self) -> dict[str, Any]:
        sizes = {name: getattr(self.shape, name) for name in ("D", "I", "E", "K")}
        numbers = {"ms": self.ms, "peak_mb": self.peak_mb, "ratio": self.ratio}
        row: dict[str, Any] = {"shape": {**sizes, "tokens": self.tokens}, "case": self.case, **numbers}
        if self.asked is not None:
            row["asked"] = self.asked
        if self.kernels is not None:
            row |= {"kernel_ms": self.kernels.ms, "launches": self.kernels.launches, "longest": self.kernels.longest}
        return row


def floor(case: str) -> str:
    """What a case is measured against: E dense MLPs for a competition step, else K."""
    return "dense_e" if case == "dense_e" or case.startswith(COMPETITION) else "dense_k"


class _DenseMlps(nn.Module):
    """`count` plain or gated MLPs on the same tokens, summed."""

    def __init__(self, shape: Shape, count: int) -> None:
        super().__init__()
        rows = 2 * shape.I if shape.gated else shape.I
        self.ups = nn.ModuleList(nn.Linear(shape.D, rows, bias=not shape.gated) for _ in range(count))
        self.downs = nn.ModuleList(nn.Linear(shape.I, shape.D, bias=not shape.gated) for _ in range(count))
        self.gated = shape.gated

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(torch.add, (self._expert(*pair, x) for pair in zip(self.ups, self.downs, strict=True)))

    def _expert(self, up: nn.Module, down: nn.Module, x: Tensor) -> Tensor:
        hidden = up(x)
        if not self.gated:
            return down(nn.functional.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return down(nn.functional.silu(gate) * value)


def measure(
    shapes: Sequence[Shape],
    *,
    tokens: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    cases: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure cases (default: all) of every shape; `tokens` per step, times are medians over `rounds`."""
    rows: list[Row] = []
    for shape in shapes:
        names = cases or (*CASES, *(_kernels_of_transformers(device) if shape.gated else ()))
        steps = {case: _Step(shape, case, tokens, device, dtype) for case in names}
        peaks = {case: step.peak_bytes() for case, step in steps.items()}  # also the warm-up
        times: dict[str, list[float]] = {case: [] for case in names}
        for number in range(rounds):
            progress(f"{shape}: round {number + 1} of {rounds}")
            for case, step in steps.items():
                times[case].append(step.seconds())
        medians = {case: statistics.median(values) for case, values in times.items()}
        for case in names:
            ratio = medians[case] / medians[floor(case)]
            kernels = steps[case].kernels() if device.type == "cuda" and case in PROFILED else None
            asked = steps[case].asked()
            rows.append(Row(shape, tokens, case, medians[case] * 1e3, peaks[case] / 1e6, ratio, kernels, asked))
    return rows


class _Step:
    """One case, ready to run: forward and backward of output and auxiliary loss."""

    def __init__(self, shape: Shape, case: str, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.module = _build(shape, case, device).to(dtype)
            self.x = torch.randn(1, tokens, shape.D, dtype=dtype, requires_grad=True)
            self.cotangent = torch.randn(1, tokens, shape.D, dtype=dtype)
            self.groups = TokenGroups.from_mask(torch.ones(1, tokens))
        self.device = device

    def run(self) -> None:
        self.module.zero_grad()
        self.x.grad = None
        if not isinstance(self.module, SparseMoeBlock):
            self.module(self.x).backward(self.cotangent)
            return
        state = self.module.state
        state.begin("language", self.groups)
        with state.recording():
            output = self.module(self.x)
        torch.autograd.backward([output, state.records[NAME].aux_loss], [self.cotangent, None])
        if state.answers:  # as after each optimizer step, so that means answer in the next one
            self.module.experts.answer_means.end_step(state.answers[NAME])

    def asked(self) -> float | None:
        """Of the last step: the share of the experts not chosen that its tokens asked, where the loss judges."""
        if not isinstance(self.module, SparseMoeBlock):
            return None
        share = self.module.state.records[NAME].metrics.summary()["asked_share"]
        assert not isinstance(share, list)
        return share

    def seconds(self) -> float:
        """Of one step; on a GPU of several without a pause, for training does not drain the device's queue after each
        block, and the launches of small kernels hide behind large ones before them."""
        steps = STEPS_IN_A_ROW if self.device.type == "cuda" else 1
        self._synchronise()
        start = time.perf_counter()
        for _ in range(steps):
            self.run()
        self._synchronise()
        return (time.perf_counter() - start) / steps

    def kernels(self) -> Kernels:
        self._synchronise()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run()
            self._synchronise()
        by_name: dict[str, list[float]] = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                by_name.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST_KERNELS]
        return Kernels(
            ms=sum(sum(times) for times in by_name.values()),
            launches=sum(len(times) for times in by_name.values()),
            longest=[(name[:120], len(times), sum(times)) for name, times in longest],
        )

    def peak_bytes(self) -> int:
        """Of one step that finds no gradients from before; includes parameters and input."""
        self.module.zero_grad()
        self.x.grad = None
        resident = sum(tensor.nbytes for tensor in (*self.module.parameters(), self.x, self.cotangent))
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.run()
            return resident + torch.cuda.max_memory_allocated(self.device) - before
        with LiveBytes() as live:
            self.run()
        return resident + live.peak

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _build(shape: Shape, case: str, device: torch.device) -> nn.Module:
    if case.startswith("dense"):
        return _DenseMlps(shape, shape.K if case == "dense_k" else shape.E)
    if case.startswith(TRANSFORMERS):
        return _block_of_transformers(shape, case.removeprefix(TRANSFORMERS))
    competes = case.startswith(COMPETITION) or case == TAUGHT
    state = RoutingState()
    state.competition_enabled, state.competing = competes, frozenset({NAME} if competes else ())
    config: dict[str, Any] = {"num_experts": shape.E, "num_experts_per_tok": shape.K}
    config["router"] = "competition" if competes or case in JUDGED else case
    if case == "autonomy":
        config["autonomy_rank"] = _best_rank(shape)
    if case == COUPLED:
        config |= {"router": "softmax", "coupling_coef": 1.0}
    if case in (RECOMPUTED, PRE_ACTIVATIONS):
        config["competition_keeps"] = "input" if case == RECOMPUTED else "pre_activations"
        config["competition_chunk_tokens"] = CHUNK_TOKENS[device.type]
    if case == TAUGHT:
        config["competition_output"] = "router"
    if case in JUDGED:
        config |= {"competition_judge": "loss", **JUDGED[case]}
    return SparseMoeBlock(
        MoeLayerConfig.model_validate(config),
        name=NAME,
        state=state,
        hidden_size=shape.D,
        intermediate_size=shape.I,
        activation="silu" if shape.gated else "gelu",
        gated=shape.gated,
        bias=not shape.gated,
    )


def _best_rank(shape: Shape) -> int:
    """Of Autonomy-of-Experts' first projection: the paper's best, a third of the width, in steps that kernels like."""
    return max(16, min(shape.D, shape.I) // 3 // 16 * 16)


def _block_of_transformers(shape: Shape, kernel: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.D,
        intermediate_size=shape.I,
        num_local_experts=shape.E,
        num_experts_per_tok=shape.K,
        experts_implementation=kernel,
    )
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def _kernels_of_transformers(device: torch.device) -> list[str]:
    """Cases of its block that can train here. Its batched_mm copies an expert's weights for each pair: too large."""
    kernels = ["grouped_mm"]
    try:
        from transformers.integrations.sonicmoe import is_sonicmoe_loadable
    except ImportError:  # a version without this kernel
        return [TRANSFORMERS + kernel for kernel in kernels]
    if device.type == "cuda" and is_sonicmoe_loadable():
        kernels.append("sonicmoe")
    return [TRANSFORMERS + kernel for kernel in kernels]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a table for the console."""
    heads = f"{'shape':<30}{'case':<36}{'ms':>10}{'ratio':>8}{'floor':>10}{'peak MB':>10}{'asked':>8}"
    on_gpu = any(row.kernels is not None for row in rows)
    yield heads + (f"{'kernel ms':>11}{'launches':>10}" if on_gpu else "")
    for row in rows:
        against = floor(row.case)
        line = f"{row.shape!s:<30}{row.case:<36}{row.ms:>10.2f}{row.ratio:>8.2f}{against:>10}{row.peak_mb:>10.1f}"
        line += f"{'' if row.asked is None else format(row.asked, '.2f'):>8}"
        yield line + (f"{row.kernels.ms:>11.2f}{row.kernels.launches:>10}" if row.kernels is not None else "")


def write_json(rows: Sequence[Row], path: Path) -> None:
    files.write_json(path, [row.to_json() for row in rows])


def write_figure(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios, a group for each shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in rows))
    cases = [case for case in dict.fromkeys(row.case for row in rows) if not case.startswith("dense")]
    figure, axes = plt.subplots(figsize=(3 + 2.5 * len(shapes), 4), layout="constrained")
    for number, case in enumerate(cases):
        heights = [row.ratio for row in rows if row.case == case]
        places = [index + (number - len(cases) / 2) / (len(cases) + 1) for index in range(len(shapes))]
        axes.bar(places, heights, 1 / (len(cases) + 1), label=case)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [str(shape) for shape in shapes])
    axes.set_ylabel("time / floor (E dense for competition, K dense else)")
    axes.legend(fontsize=7, ncols=2)
    files.write_figure(path, figure, dpi=150)
    plt.close(figure)
