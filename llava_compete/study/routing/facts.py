"""A table of facts that only the right expert can hold: T tasks x 16 x 16 random answers out of 16.

x = e_task + e_a + e_b, two residual MoE layers, a linear head; accuracy over all facts, so without noise of evaluation.
What the experts can hold is the limit, so routing decides. Suffixes: R runs, B facts of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.study.routing.draws import generator_of, normal, uniform
from llava_compete.study.routing.layer import Widths, layers
from llava_compete.study.routing.operators import RmsNorm
from llava_compete.study.routing.rules import Rule

ITEMS, ANSWERS, BATCH = 16, 16, 256
WIDTHS = Widths(num_experts=8, num_chosen=2, hidden=48, intermediate=12)


class Facts:
    """One rule on the facts of R seeds. Score: percent of facts answered rightly."""

    warmup, floor = 0.05, 0.05

    def __init__(self, rule: Rule, seeds: Sequence[int], steps: int, device: str, num_tasks: int):
        facts = num_tasks * ITEMS**2
        generators = [generator_of(seed, "facts") for seed in seeds]
        self.answers = torch.stack([torch.randint(ANSWERS, (facts,), generator=g) for g in generators]).to(device)
        self.drawn = torch.stack([_batches(facts, steps, g) for g in generators]).to(device)
        # One table of embeddings: tasks, then the first and the second item.
        rows, hidden = num_tasks + 2 * ITEMS, WIDTHS.hidden
        self.embeddings = normal((rows, hidden), 1.0, seeds, ("embeddings",), device)
        self.head = uniform((ANSWERS, hidden), hidden, seeds, ("head",), device)
        self.layers = layers(rule, WIDTHS, seeds, 2, device)
        number = torch.arange(facts, device=device)
        task, first, second = number // ITEMS**2, number // ITEMS % ITEMS, number % ITEMS
        self.parts_F3 = torch.stack([task, num_tasks + first, num_tasks + ITEMS + second], 1)
        fixed = _evenly if rule.even else _by_hash
        self.fixed = [fixed(num_tasks, layer, device) for layer in range(2)]
        self.task_F = task
        self.always = rule.response is not None and rule.response.always

    @property
    def parameters(self) -> list[Tensor]:
        return [self.embeddings, self.head, *(p for layer in self.layers for p in layer.parameters)]

    def loss_R(self, step: int, competing_LR: list[Tensor | None]) -> Tensor:
        """Loss of each run at a step, with the mean of the layers' auxiliary losses."""
        facts_RB = self.drawn[:, step]
        logits = self._logits(facts_RB, True, competing_LR)
        task_R = F.cross_entropy(logits.flatten(0, 1), self.answers.gather(1, facts_RB).flatten(), reduction="none")
        return task_R.view(facts_RB.shape).mean(1) + sum(layer.aux_R for layer in self.layers) / 2

    @torch.no_grad()
    def score_R(self) -> Tensor:
        """Percent of all facts."""
        right_R = torch.zeros(len(self.answers), device=self.answers.device)
        every = torch.ones(len(self.answers), dtype=torch.bool, device=self.answers.device)
        for facts_B in torch.arange(self.answers.shape[1], device=self.answers.device).split(2048):
            facts_RB = facts_B.expand(len(self.answers), -1)
            logits = self._logits(facts_RB, False, [every if self.always else None] * 2)
            right_R += (logits.argmax(-1) == self.answers[:, facts_B]).sum(1)
        return 100 * right_R / self.answers.shape[1]

    def _logits(self, facts_RB: Tensor, training: bool, competing_LR: list[Tensor | None]) -> Tensor:
        runs, rows = self.embeddings.shape[:2]
        offset = torch.arange(runs, device=facts_RB.device).view(-1, 1, 1) * rows
        index = self.parts_F3[facts_RB] + offset
        x = F.embedding(index, self.embeddings.flatten(0, 1)).sum(2)
        for layer, fixed, competing in zip(self.layers, self.fixed, competing_LR, strict=True):
            chosen = fixed[self.task_F[facts_RB]]
            x = x + layer(RmsNorm.apply(x), training=training, competing_R=competing, fixed_RTE=chosen)
        return torch.bmm(x, self.head.transpose(1, 2))


def _batches(facts: int, steps: int, generator: torch.Generator) -> Tensor:
    """[steps, B]: facts of a batch are distinct, and batches independent."""
    return torch.stack([torch.randperm(facts, generator=generator)[:BATCH] for _ in range(steps)])


def _evenly(num_tasks: int, layer: int, device: str) -> Tensor:
    """[tasks, E]: of experts in a drawn order, a task has two neighbours."""
    order = torch.randperm(WIDTHS.num_experts, generator=generator_of("order", layer))
    task = torch.arange(num_tasks)
    chosen = torch.zeros(num_tasks, WIDTHS.num_experts)
    for place in range(WIDTHS.num_chosen):
        chosen[task, order[(task + place) % WIDTHS.num_experts]] = 1.0
    return chosen.bool().to(device)


def _by_hash(num_tasks: int, layer: int, device: str) -> Tensor:
    """[tasks, E]: two experts of each task, without looking at anything else."""
    scores = torch.rand(num_tasks, WIDTHS.num_experts, generator=generator_of("hash", layer))
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(WIDTHS.num_chosen).indices, 1.0)
    return chosen.bool().to(device)
