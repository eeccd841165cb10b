"""Train all runs of a rule on a task in one program: coefficients are vectors over runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_compete.moe.schedule import CompetitionSchedule
from llava_compete.study.routing.optimizer import RunsAdamW
from llava_compete.study.routing.rules import Rule
from llava_compete.study.routing.tasks import Task


class Result(NamedTuple):
    """Of each run: the task's score, and the price in experts' arithmetic beyond that of K a token, as a share."""

    scores: list[float]
    prices: list[float]


def train(
    task: Task,
    rule: Rule,
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: int,
    device: str,
) -> Result:
    """Train one run for each seed and learning rate (of equal length).

    A run does not depend on those beside it but for rounding. `ValueError` on unequal lengths.
    """
    if len(seeds) != len(rates):
        raise ValueError(f"found {len(seeds)} seeds and {len(rates)} rates, expected as many")
    network = task.build(rule, seeds, steps, device)
    optimizer = RunsAdamW(network.parameters, torch.tensor(rates), steps, network.warmup, network.floor)
    competing = _schedule(rule, seeds, steps, task.layers)
    for step in range(steps):
        for layer in network.layers:
            layer.judging.progress = step / steps
        now = [None if competing is None else _any(competing[step, layer], device) for layer in range(task.layers)]
        network.loss_R(step, now).sum().backward()
        optimizer.step()
    price_R = torch.stack([layer.price_R for layer in network.layers]).mean(0)
    return Result(network.score_R().tolist(), price_R.tolist())


def _schedule(rule: Rule, seeds: Sequence[int], steps: int, layers: int) -> Tensor | None:
    """Which runs compete or judge, [steps, layers, R] of bool on the host; a schedule of its own for each seed."""
    held = rule.response or rule.judge
    if held is None:
        return None
    warmup = rule.response.warmup if rule.response else 0.0
    marks = torch.zeros(steps, layers, len(seeds), dtype=torch.bool)
    if held.rate == 1 and warmup == 0:
        first, end = (round(share * steps) for share in (rule.judge.period if rule.judge else (0.0, 1.0)))
        marks[first:end] = True
        return marks
    names = [str(layer) for layer in range(layers)]
    for run, seed in enumerate(seeds):
        schedule = CompetitionSchedule.build(seed, steps, names, held.rate, warmup, layers)
        for step, chosen in enumerate(schedule.competing):
            marks[step, list(chosen), run] = True
    return marks


def _any(marks_R: Tensor, device: str) -> Tensor | None:
    return marks_R.to(device) if bool(marks_R.any()) else None
