"""Regression on a teacher of 8 true experts, whose gate is a softmax, a competition, or clusters of the inputs.

A student of 12 experts of 6 hidden units, K 2, one layer. Score: squared error on new inputs over their variance.
Here data can be the limit: every run takes the same steps, whatever the number n of its samples. Suffixes: R runs, N
samples, D width, E true experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.study.routing.draws import generator_of
from llava_compete.study.routing.layer import Widths, layers
from llava_compete.study.routing.rules import Rule

Gate = Literal["softmax", "competition", "clusters"]
TRUE_EXPERTS, BATCH, TEST, NOISE = 8, 128, 2000, 0.1
WIDTHS = Widths(num_experts=12, num_chosen=2, hidden=12, intermediate=6)


class TeacherStudent:
    """One rule on the teachers and the data of R seeds."""

    warmup, floor = 0.05, 0.03

    def __init__(self, rule: Rule, seeds: Sequence[int], steps: int, device: str, gate: Gate, samples: int):
        made = [_data(seed, gate, samples) for seed in seeds]
        self.inputs, self.targets, self.test_inputs, self.test_targets = (
            torch.stack(tensors).to(device) for tensors in zip(*made, strict=True)
        )
        drawn = [torch.randint(samples, (steps, BATCH), generator=generator_of(seed, "order")) for seed in seeds]
        self.drawn = torch.stack(drawn).to(device)
        self.layers = layers(rule, WIDTHS, seeds, 1, device)
        self.always = rule.response is not None and rule.response.always
        scores = torch.rand(2**3, WIDTHS.num_experts, generator=generator_of("hash"))
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(WIDTHS.num_chosen).indices, 1.0)
        self.fixed = chosen.bool().to(device)

    @property
    def parameters(self) -> list[Tensor]:
        return self.layers[0].parameters

    def loss_R(self, step: int, competing_LR: list[Tensor | None]) -> Tensor:
        """Mean squared error of each run at a step, with the auxiliary loss."""
        rows = self.drawn[:, step].unsqueeze(-1).expand(-1, -1, WIDTHS.hidden)
        found = self._run(self.inputs.gather(1, rows), True, competing_LR[0])
        return (found - self.targets.gather(1, rows)).square().mean((1, 2)) + self.layers[0].aux_R

    @torch.no_grad()
    def score_R(self) -> Tensor:
        """Error over variance on the test points, without noise."""
        every = torch.ones(len(self.inputs), dtype=torch.bool, device=self.inputs.device) if self.always else None
        found = self._run(self.test_inputs, False, every)
        centred = self.test_targets - self.test_targets.mean(1, keepdim=True)
        return (found - self.test_targets).square().sum((1, 2)) / centred.square().sum((1, 2))

    def _run(self, x: Tensor, training: bool, competing_R: Tensor | None) -> Tensor:
        bits = (x[..., :3] > 0).long()
        fixed = self.fixed[bits[..., 0] * 4 + bits[..., 1] * 2 + bits[..., 2]]
        return self.layers[0](x, training=training, competing_R=competing_R, fixed_RTE=fixed)


def own_share(seed: int, gate: Gate, samples: int) -> float:
    """The mean variance of a coordinate of the test targets over their variance about one mean of all coordinates."""
    targets = _data(seed, gate, samples)[3]
    return float((targets - targets.mean(0)).square().mean() / (targets - targets.mean()).square().mean())


def _data(seed: int, gate: Gate, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and noisy targets [N, D], test inputs and targets, of the teacher that `seed` draws."""
    rng = generator_of(seed, "teacher", gate)
    hidden, inner = WIDTHS.hidden, WIDTHS.intermediate
    up = torch.randn(TRUE_EXPERTS, hidden, inner, generator=rng) * 1.5 / hidden**0.5
    down = torch.randn(TRUE_EXPERTS, inner, hidden, generator=rng) * 2 / inner**0.5
    gates = torch.randn(TRUE_EXPERTS, hidden, generator=rng) * 2.5 / hidden**0.5
    centres = torch.randn(TRUE_EXPERTS, hidden, generator=rng) * 1.2
    x = torch.randn(TEST + samples, hidden, generator=rng)
    cluster = torch.randint(TRUE_EXPERTS, (len(x),), generator=rng)
    if gate == "clusters":
        x = centres[cluster] + 0.6 * x
    answers = torch.einsum("nei,eio->neo", F.gelu(torch.einsum("nd,edi->nei", x, up)), down)
    if gate == "clusters":
        weights = F.one_hot(cluster, TRUE_EXPERTS).float()
    else:
        scores = x @ gates.t() if gate == "softmax" else F.softplus(answers).mean(-1)
        best = torch.zeros_like(scores).scatter_(1, scores.topk(2).indices, 1.0)
        raw = scores.softmax(-1) * best if gate == "softmax" else scores * best
        weights = raw / raw.sum(-1, keepdim=True)
    targets = torch.einsum("ne,neo->no", weights, answers)
    targets = targets / targets.std()
    noisy = targets[TEST:] + NOISE * torch.randn(samples, hidden, generator=rng)
    return x[TEST:], noisy, x[:TEST], targets[:TEST]
