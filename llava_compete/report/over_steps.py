"""The report's sections on what changes while a run trains: losses and routers by step, and choices by checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_compete.evaluation.checkpoint_routing import CheckpointRouting
from llava_compete.evaluation.token_choices import overlap
from llava_compete.report.colors import OKABE_ITO
from llava_compete.report.heat_maps import layer_lines, step_lines, step_maps
from llava_compete.report.page import Page
from llava_compete.report.run_facts import RunFacts

_BY_LAYER = (
    ("router_entropy", "nats", "Entropy of the router's probabilities; even would be the logarithm of E."),
    ("router_agreement", "share", "Winners of competition steps that the router had chosen too."),
    ("expert_load", "multiple of 1/E", "Load of the most used expert, in multiples of even use."),
)


def training_section(page: Page, run: RunFacts) -> None:
    """Losses, what the routing losses add, and routers by layer, over the logged steps."""
    if len(run.steps) < 2:
        return
    page.heading(f"Training of {run.name}")
    steps = [line["step"] for line in run.steps]
    losses = {
        name: (steps, [line.get(name, float("nan")) for line in run.steps])
        for name in ("loss", "lm_loss")
        if any(name in line for line in run.steps)
    }
    page.figure(
        step_lines(losses, "nats a token"), f"{run.name}-loss", f"Loss over {len(steps)} logged steps of {run.path}."
    )
    if "lm_loss" in losses:
        both = [line for line in run.steps if "lm_loss" in line]
        extra = [line["loss"] - line["lm_loss"] for line in both]
        if any(extra):
            page.figure(
                step_lines({"loss - lm_loss": ([line["step"] for line in both], extra)}, "nats a token"),
                f"{run.name}-routing-loss",
                "What the routing losses add to the language model's loss.",
            )
    for key, label, caption in _BY_LAYER:
        series = _by_layer(run.steps, key)
        if not series:
            continue
        logged = f"over {max(len(at) for at, _ in series.values())} logged steps"
        if len(series) <= len(OKABE_ITO):
            figure, caption = step_lines(series, label), f"{caption} A line a layer, {logged}."
        else:
            figure, caption = step_maps(series, label), f"{caption} A row a layer, {logged}."
        page.figure(figure, f"{run.name}-{key}", caption)


def _by_layer(steps: Sequence[dict[str, Any]], key: str) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in steps:
        for name, value in line.items():
            if name.startswith(f"{key}/") and value is not None:
                number = max(value) * len(value) if isinstance(value, list) else value
                mine = series.setdefault(name.removeprefix(f"{key}/"), ([], []))
                mine[0].append(line["step"])
                mine[1].append(number)
    return series


def checkpoints_section(
    page: Page, routing: Mapping[str, CheckpointRouting], facts: Mapping[str, dict[str, Any]]
) -> None:
    """Loads, agreement with a competition and saturation of checkpoints with the same layers as the last one given."""
    chosen = {name: found.choices for name, found in routing.items() if found.choices}
    if len(chosen) < 2:
        return
    last = list(chosen)[-1]
    shapes = {layer: choices.shape for layer, choices in chosen[last].items()}
    names = [name for name, choices in chosen.items() if {n: c.shape for n, c in choices.items()} == shapes]
    if len(names) < 2:
        return
    page.heading("By checkpoint")
    layers = {name: facts[name]["layers"] for name in names}
    loads = {name: {n: max(la["all"]["load"]) * len(la["all"]["load"]) for n, la in layers[name].items()}
             for name in names}  # fmt: skip
    recall = {name: {n: la["competition"]["recall"] for n, la in layers[name].items() if "competition" in la}
              for name in names}  # fmt: skip
    shared = {name: {n: overlap(c, chosen[last][n]) for n, c in chosen[name].items()} for name in names[:-1]}
    panels = {"largest load (multiple of 1/E)": loads}
    if any(recall.values()):
        panels["winners found (recall@K)"] = recall
    tokens = len(next(iter(chosen[last].values())))
    where = f"{facts[last]['rows']} rows of {', '.join(facts[last]['sources'])}"
    page.figure(
        layer_lines({**panels, f"choices shared with {last}": shared}),
        "checkpoints",
        f"By layer, a line a checkpoint: the load of its most used expert, the winners of a competition that its "
        f"router finds, and how many of its choices {last} makes too. {where}; choices are compared on {tokens:,} "
        "tokens a layer of them.",
    )
    page.table(["layer", *shared], [[n, *(f"{shared[name][n]:.3f}" for name in shared)] for n in chosen[last]])
    chance = " or ".join(dict.fromkeys(f"{la['chosen'] / la['experts']:.2f}" for la in layers[last].values()))
    page.note(
        f"Saturation: the share of a checkpoint's choices that {last} makes too, by chance {chance}. "
        "`--checkpoints` takes those that a run has kept, from the first to the last."
    )
