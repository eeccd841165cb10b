"""One autograd node for a weighted sum over experts, in which the loss may also judge those that were not chosen.

All experts' hidden states are computed: at these sizes that is cheaper than gathering. So the gradient by an expert's
weight, <dL/dy, Y_e>, is there for every expert, chosen or not, and the judgement costs the program nothing; what it
would cost a sparse one is counted (`MoeLayer.price_R`). Suffixes: R runs, T tokens, E experts, I hidden, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Question(NamedTuple):
    """What the loss is asked about a step: see `rules.Judge`.

    asked_RTE: experts that answer themselves. strength: 1 in the runs that judge in this step, else 0, or with what a
    token's term is multiplied; [R, 1 or T, 1]. estimate: of g [R, T, O], <g, answer> [R, T, E] where estimated_RTE.
    last_RTE: the least probable of the choice, for the baseline `last`.
    """

    logits_RTE: Tensor
    asked_RTE: Tensor
    chosen_RTE: Tensor
    strength: Tensor
    baseline: str
    estimated_RTE: Tensor | None = None
    estimate: Callable[[Tensor], Tensor] | None = None
    last_RTE: Tensor | None = None


class Mixture(torch.autograd.Function):
    """hidden [R, T, E, I], weights [R, T, E], down [R, E, I, O] -> [R, T, O]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, down: Tensor, logits: Tensor | None, question: Any
    ) -> Tensor:
        weighted = (hidden * weights.unsqueeze(-1)).flatten(2)
        output = torch.bmm(weighted, down.flatten(1, 2))
        ctx.question = question
        ctx.save_for_backward(hidden, weights, down, weighted, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, down, weighted, output = ctx.saved_tensors
        grad_down = torch.bmm(weighted.transpose(1, 2), grad).view_as(down)
        grad_weighted = torch.bmm(grad, down.flatten(1, 2).transpose(1, 2)).view_as(hidden)
        grad_weights = (grad_weighted * hidden).sum(-1)
        of_logits = None
        if ctx.question is not None:
            of_logits = _judge(grad, output, weights, grad_weights, ctx.question)
        return grad_weighted.mul_(weights.unsqueeze(-1)), grad_weights, grad_down, of_logits, None


def _judge(grad: Tensor, output: Tensor, weights: Tensor, answers: Tensor, question: Question) -> Tensor:
    """The term's gradient by the logits: that of sum over asked j of p_j <g, Y_j - y>, all but p constant."""
    probs, asked = question.logits_RTE.detach().softmax(-1), question.asked_RTE
    baseline: Tensor | float = 0.0
    if question.baseline == "output":
        baseline = (grad * output).sum(-1, keepdim=True)
    elif question.last_RTE is not None:
        baseline = (answers * question.last_RTE).sum(-1, keepdim=True)
    if question.estimated_RTE is not None and question.estimate is not None:
        estimates = question.estimate(grad)
        if question.baseline == "estimate":
            baseline = (estimates * weights).sum(-1, keepdim=True)
        answers = torch.where(question.estimated_RTE, estimates, answers)
        asked = asked | question.estimated_RTE
    answers = (answers - baseline) * (asked & ~question.chosen_RTE) * question.strength
    return torch._softmax_backward_data(answers, probs, -1, probs.dtype)
