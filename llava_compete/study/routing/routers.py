"""The package's routers with a leading dimension of runs, a few more of other papers, and controls.

Every tensor over experts is dense: a choice is a mask, weights are 0 outside it. Suffixes: R runs, T tokens, D width, E
experts, Z reduced width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.bias_balanced import UPDATE_RATE
from llava_compete.moe.routers import COSINE_NORM, COSINE_TEMPERATURE, PERTURBATION, XMOE_EPS
from llava_compete.study.routing.choice import Choice, among, largest
from llava_compete.study.routing.rules import Rule
from llava_compete.study.routing.slotted import ternary, zero_computation

JITTER = 0.01  # SparseMixer's, as in Phi-3.5-MoE
_NEVER = -torch.inf


class Routers:
    """The routers of one layer in R runs, with what they keep between steps.

    Args:
        weights: by the names of the package's router; [R, ...] each.
        num_chosen: K; a shared expert counts.
        generators: one a run, for rules that draw.
    """

    def __init__(self, rule: Rule, weights: dict[str, Tensor], num_chosen: int, generators: list[torch.Generator]):
        self.rule, self.weights, self.generators = rule, weights, generators
        self.count = num_chosen - rule.shared
        first = next(iter(weights.values()), None)
        self.bias_R1E = None
        if rule.router == "bias_balanced" and first is not None:
            self.bias_R1E = torch.zeros(first.shape[0], 1, first.shape[1], device=first.device)

    def __call__(self, x_RTD: Tensor, training: bool, before_RTS: Tensor | None = None) -> Choice:
        """`before_RTS`: logits of the layer before, for a router with a residual."""
        if self.rule.router in ("xmoe", "perturbed_cosine"):
            return self._cosine(x_RTD)
        if self.rule.router == "autonomy":
            return self._autonomy(x_RTD)
        logits = torch.bmm(x_RTD, self.weights["weight"].transpose(1, 2))
        if self.rule.router == "tc_moe":
            return ternary(logits, self.count)
        if self.rule.router == "moe_plus_plus":
            before = torch.zeros_like(logits) if before_RTS is None else before_RTS
            logits = torch.baddbmm(logits, before, self.weights["residual"].transpose(1, 2))
            return zero_computation(logits, self.count)
        if self.rule.router == "sparsemixer":
            return _sparse_mixer(logits, self.count, self.generators if training else None)
        if self.rule.router == "remoe":
            weights = logits.relu()
            return Choice(logits, logits, weights > 0, largest(logits, 1)[0], weights)
        scores = F.logsigmoid(logits) if "sigmoid" in self.rule.router else logits
        probs = logits.softmax(-1) + self.bias_R1E if self.bias_R1E is not None else scores
        chosen, first = largest(probs.detach(), self.count)
        if self.rule.router == "default_moe":
            return Choice(logits, logits, chosen, first, logits.softmax(-1))
        weights = among(scores, chosen)
        if self.rule.shared:
            weights = torch.cat([0.5 * weights, torch.full_like(weights[..., :1], 0.5)], -1)
        # The balance loss reads softmax(W x) whatever the choice was scored by.
        return Choice(logits, logits, chosen, first, weights)

    def _autonomy(self, x_RTD: Tensor) -> Choice:
        low_REHD = self.weights["low_proj"]
        low_RTEH = torch.bmm(x_RTD, low_REHD.flatten(1, 2).transpose(1, 2)).unflatten(2, low_REHD.shape[1:3])
        norms = low_RTEH.norm(dim=-1)
        chosen, first = largest(norms.detach(), self.count)
        return Choice(norms, norms, chosen, first, among(norms, chosen), low_RTEH=low_RTEH)

    def _cosine(self, x_RTD: Tensor) -> Choice:
        reduced = torch.bmm(x_RTD, self.weights["inp_reduction"].transpose(1, 2))
        length = reduced.norm(dim=-1, keepdim=True)
        rows = self.weights["expert_embeddings"]
        norms = rows.detach().norm(dim=-1, keepdim=True)
        if self.rule.router == "xmoe":
            length = length.clamp(min=XMOE_EPS)
        else:
            length, norms = length + PERTURBATION, norms + PERTURBATION
        logits = torch.bmm(reduced / length, (rows * (COSINE_NORM / norms)).transpose(1, 2))
        scores = logits / COSINE_TEMPERATURE
        probs = scores.softmax(-1)
        chosen, first = largest(probs.detach(), self.count)
        return Choice(logits, scores, chosen, first, among(probs, chosen))

    @torch.no_grad()
    def end_step(self, choice: Choice) -> None:
        """Move the bias of `bias_balanced` by the loads of a step."""
        if self.bias_R1E is not None:
            load = choice.chosen_RTE.float().sum(1, keepdim=True)
            self.bias_R1E += UPDATE_RATE * torch.sign(load.mean(-1, keepdim=True) - load)


def random_choice(shape: tuple[int, int, int], count: int, generators: list[torch.Generator], device: str) -> Tensor:
    """Uniform draws of `count` experts a token, as a mask [R, T, E]."""
    return largest(uniform(shape, generators, device), count)[0]


def uniform(shape: tuple[int, int, int], generators: list[torch.Generator], device: str | torch.device) -> Tensor:
    """[R, T, E] from each run's own generator, so that a run does not depend on those beside it."""
    return torch.stack([torch.rand(shape[1:], generator=g) for g in generators]).to(device)


class _Heun(torch.autograd.Function):
    """SparseMixer-v2's estimate: forward p_d times 1 or 1/3, backward dp_d/dlogits of the masked softmax."""

    @staticmethod
    def forward(ctx, scores, picked, gates, scale):  # type: ignore[no-untyped-def]
        multiplier = (gates * picked).sum(-1, keepdim=True)
        ctx.save_for_backward(multiplier, picked, gates)
        return multiplier * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        multiplier, picked, gates = ctx.saved_tensors
        return (grad * multiplier) * (picked - gates), None, None, None


def _sparse_mixer(logits: Tensor, count: int, generators: list[torch.Generator] | None) -> Choice:
    """GRIN's top-K: experts drawn one after another among those near the best; its multipliers do not sum to 1."""
    weights, scores = torch.zeros_like(logits), logits
    taken = torch.zeros_like(logits, dtype=torch.bool)
    best_of_all = largest(logits.detach(), 1)[0]
    for _ in range(count):
        best = scores.detach().amax(-1, keepdim=True)
        far = (best - scores.detach()) / torch.maximum(logits.detach().abs(), best) > 2 * JITTER
        masked = scores.masked_fill(far | taken, _NEVER)
        gates = masked.detach().softmax(-1)
        top = largest(masked.detach(), 1)[0]
        if generators is None:
            picked, scale = top, torch.ones_like(best)
        else:
            draws = uniform((*logits.shape[:2], logits.shape[2] + 1), generators, logits.device).clamp_(1e-9, 1 - 1e-7)
            gumbel = -torch.log(-torch.log(draws[..., :-1]))
            picked = largest(masked.detach() + gumbel, 1)[0]
            whole = (picked & top).any(-1, keepdim=True) | (draws[..., -1:] > 0.75)
            scale = torch.where(whole, 1.0, 1 / 3)
        multiplier = _Heun.apply(scores, picked.to(logits.dtype), gates, scale)
        weights = weights + multiplier * picked
        taken = taken | picked
        scores = logits.masked_fill(taken, _NEVER)
    return Choice(logits, logits, taken, best_of_all, weights)
