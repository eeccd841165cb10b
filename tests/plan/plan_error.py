"""How far `plan` is from what steps cost on a CPU: `python tests/plan/plan_error.py OUT`.

As on a cluster, one number is taken from a measurement: the share of the peak, here operations a second of processor
time in the first case's router step, on one thread. All other cases' seconds are predicted by it from their operations
as `plan` counts them, and compared with processor time, the smallest of some steps. Bytes are those alive at a step's
peak, parameters and gradients apart, and need no calibration.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_plan import LiveBytes
from tiny import tiny_model

from llava_compete.manifest import git_state
from llava_compete.model.modeling import LlavaCompeteForConditionalGeneration
from llava_compete.moe.block import moe_blocks
from llava_compete.plan.step_cost import simulate

ROWS, LENGTH, REPEATS = 4, 256, 5
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


class Case(NamedTuple):
    """A language model of some width and depth; in a competition step the middle layer competes."""

    width: int
    layers: int
    moe: dict[str, Any] | None
    competing: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        kind = "dense" if self.moe is None else f"{self.moe['num_experts']} experts"
        step = "competition step" if self.competing else "router step" if self.moe else "step"
        return f"{self.layers} layers of {self.width}, {kind}, {step}{', checkpointing' * self.checkpointing}"


CASES = [
    Case(256, 4, EXPERTS),
    Case(256, 4, EXPERTS, competing=True),
    Case(256, 4, None),
    Case(512, 4, EXPERTS),
    Case(512, 4, EXPERTS, competing=True),
    Case(512, 4, EXPERTS, checkpointing=True),
    Case(512, 4, {**EXPERTS, "num_experts": 16}),
    Case(512, 4, {**EXPERTS, "num_experts": 16}, competing=True),
    Case(768, 6, EXPERTS),
]


def model_of(case: Case) -> LlavaCompeteForConditionalGeneration:
    language = {
        "hidden_size": case.width,
        "intermediate_size": 3 * case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.width // 64,
        "num_key_value_heads": case.width // 64,
    }
    model, _ = tiny_model(moe=None if case.moe is None else {"language": case.moe}, language=language, tower=None)
    return model


def competing_layers(model: LlavaCompeteForConditionalGeneration, case: Case) -> frozenset[str]:
    names = list(moe_blocks(model))
    return frozenset(names[len(names) // 2 :][:1]) if case.competing else frozenset()


def measured(case: Case) -> tuple[float, int]:
    """Seconds of processor time and bytes of a forward and backward."""
    model = model_of(case)
    model.routing.competing = competing_layers(model, case)
    if case.checkpointing:
        model.activation_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(5, 200, (ROWS, LENGTH))
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.process_time() - began)
    states = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
    with LiveBytes(states) as live:
        model(input_ids=ids, labels=ids).loss.backward()
    return min(seconds), live.peak


def planned(case: Case) -> tuple[int, int]:
    """Operations and bytes of the same."""
    model = model_of(case).to("meta")
    cost = simulate(model, ROWS, LENGTH, 0, competing_layers(model, case))
    return cost.step_flops(case.checkpointing), cost.activations(case.checkpointing)


def rows_of(cases: Iterable[Case]) -> list[dict[str, Any]]:
    rows, rate = [], 0.0
    for case in cases:
        (seconds, peak), (flops, kept) = measured(case), planned(case)
        rate = rate or flops / seconds
        row = {"case": case.name, "seconds": seconds, "planned_seconds": flops / rate, "bytes": peak}
        rows.append({**row, "planned_bytes": kept, "flops": flops})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def error(planned: float, found: float) -> str:
    return f"{100 * (planned / found - 1):+.0f}%"


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rows, commit = rows_of(CASES), git_state().get("commit", "?")[:10]
    lines = [
        "# What plan says against what a CPU does",
        "",
        f"`python tests/plan/plan_error.py eval/results/plan_error`, {date.today()}, {commit}: forward and",
        f"backward of {ROWS} rows of {LENGTH} tokens in float32, one thread, processor time; the first case's",
        f"{rows[0]['flops'] / rows[0]['seconds'] / 1e9:.0f} GFLOP/s are what the others are planned with.",
        "",
        "| | seconds | planned | error | MiB at the peak | planned | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times, sizes = (row["seconds"], row["planned_seconds"]), (row["bytes"] / 2**20, row["planned_bytes"] / 2**20)
        cells = [*(f"{one:.3f}" for one in times), error(times[1], times[0])]
        cells += [*(f"{one:.0f}" for one in sizes), error(sizes[1], sizes[0])]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
