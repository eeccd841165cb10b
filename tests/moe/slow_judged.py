"""The loss's judgement by loops over tokens and experts, written from design.md, in the dtype of its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.activations import ACT2FN

Expert = Callable[[int, Tensor], Tensor]


def make_expert(tensors: dict[str, Tensor], activation: str, gated: bool) -> Expert:
    """Expert number and token [D] -> output [O]; `tensors` by the names of `PackedExperts`."""
    act, kind = ACT2FN[activation], "gate_up_proj" if gated else "up_proj"

    def expert(index: int, x: Tensor) -> Tensor:
        hidden = tensors[kind][index] @ x
        if f"{kind}_bias" in tensors:
            hidden = hidden + tensors[f"{kind}_bias"][index]
        if gated:
            half = len(hidden) // 2
            hidden = act(hidden[:half]) * hidden[half:]
        else:
            hidden = act(hidden)
        output = tensors["down_proj"][index] @ hidden
        return output + tensors["down_proj_bias"][index] if "down_proj_bias" in tensors else output

    return expert


def route(logits: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The choice of one token and its weights, with gradient."""
    choice = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[:count]
    return choice, torch.softmax(logits[choice], 0)


def asked(logits: Tensor, count: int, margin: float, contenders: int | None) -> list[int]:
    """Experts whom one token asks, the likeliest first."""
    probs = torch.softmax(logits, 0).tolist()
    order = sorted(range(len(probs)), key=lambda e: (-probs[e], e))
    others = order[count:] if contenders is None else order[count : count + contenders]
    return [e for e in others if probs[e] >= margin * probs[order[count - 1]]]


def block_output(expert: Expert, logits: Tensor, x: Tensor, count: int) -> Tensor:
    """A router step of one token."""
    choice, weights = route(logits, count)
    return sum((w * expert(e, x) for e, w in zip(choice, weights, strict=True)), torch.zeros(()))


def judgement(
    expert: Expert,
    logits: Tensor,
    x: Tensor,
    grad: Tensor,
    count: int,
    *,
    baseline: bool = True,
    margin: float = 0.0,
    contenders: int | None = None,
    asks: bool = True,
    means: dict[int, Tensor] | None = None,
) -> Tensor:
    """The sum whose gradient the logits get, of one token; a function of the logits alone.

    `means`: by expert, what answers in the place of those that are not asked.
    """
    x = x.detach()
    y = block_output(expert, logits, x, count).detach() if baseline else torch.zeros_like(grad)
    probs, total = torch.softmax(logits, 0), logits.sum() * 0
    answers = {e: mean for e, mean in (means or {}).items() if e not in route(logits, count)[0]}
    if asks:
        answers |= {e: expert(e, x).detach() for e in asked(logits, count, margin, contenders)}
    for e, answer in answers.items():
        total = total + probs[e] * (grad @ (answer - y)).detach()
    return total


class SlowMeans:
    """Running means of what experts said to the tokens that chose them; `said` collects one step's."""

    def __init__(self) -> None:
        self.means: dict[int, Tensor] = {}
        self.said: dict[int, list[Tensor]] = {}

    def hear(self, expert: Expert, logits: Tensor, x: Tensor, count: int) -> None:
        for e in route(logits, count)[0]:
            self.said.setdefault(e, []).append(expert(e, x).detach())

    def end_step(self) -> None:
        for e, outputs in self.said.items():
            now = torch.stack(outputs).mean(0)
            self.means[e] = 0.9 * self.means[e] + 0.1 * now if e in self.means else now
        self.said = {}
