"""The losses of a forward: the language model's, and each part's mean over its MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.records import LayerStack
from llava_compete.moe.state import TokenGroups
from llava_compete.parts import IGNORE_INDEX


def language_loss(
    logits: Tensor, labels: Tensor, num_items: Tensor | int | None, label_positions: Tensor | None = None
) -> Tensor:
    """Cross entropy of predicting token n+1 at n, summed, over `num_items` (default: the supervised tokens here).

    logits: [B, N, V], or [1, M, V] at the M `label_positions` of [B, N] flattened.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    if label_positions is not None:
        targets = targets.index_select(0, label_positions)
    targets = targets.to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items is None:
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / torch.as_tensor(num_items, device=total.device)


def routing_losses(stacks: dict[tuple[str, ...], LayerStack]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """For each part the mean over its layers of the auxiliary loss and of each term (absent counts as 0).

    stacks: by names of layers.
    """
    parts: dict[str, list[LayerStack]] = {}
    for names, stack in stacks.items():
        parts.setdefault(names[0].split(".")[0], []).append(stack)
    aux_losses: dict[str, Tensor] = {}
    terms: dict[str, Tensor] = {}
    for part, part_stacks in parts.items():
        count = sum(len(stack.records) for stack in part_stacks)
        device = part_stacks[0].aux_loss_L.device
        for stack in part_stacks:
            _add(aux_losses, part, (stack.aux_loss_L.sum() / count).to(device))
            for term, values_L in stack.losses.items():
                _add(terms, f"{part}/{term}", (values_L.sum() / count).to(device))
    return aux_losses, terms


class _WithLoss(torch.autograd.Function):
    """The hidden states as they are; in backward a scalar loss gets the gradient `scale`, as if it were in the sum."""

    @staticmethod
    def forward(ctx: Any, hidden_BNH: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return hidden_BNH.view_as(hidden_BNH)

    @staticmethod
    def backward(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_BNH, torch.full_like(ctx.like, ctx.scale), None


def attach_losses(hidden_BNH: Tensor, losses: Sequence[Tensor], scale: float) -> Tensor:
    """Hidden states through which `scale` times each loss reaches the gradients, whoever computes the rest."""
    for loss in losses:
        if loss.requires_grad:
            hidden_BNH = _WithLoss.apply(hidden_BNH, loss.to(hidden_BNH.device), scale)
    return hidden_BNH


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def own_balance_loss(router_logits: Sequence[Tensor], num_chosen: int, groups: TokenGroups) -> Tensor:
    """The balance loss of a language model's own experts (Switch, arXiv 2101.03961, equations 4 to 6): E x sum over
    experts of share of choices x mean probability, both over all tokens of all layers; 1 x K when uniform.

    As transformers' `load_balancing_loss_func` of one sequence; of several it is the mean over sequences, so that no
    cut of a batch changes it, as in all losses here.

    router_logits: of each layer, [T, E].
    """
    probs_LTE = torch.stack([logits.flatten(0, -2).float() for logits in router_logits]).softmax(-1)
    ones_LTE = torch.zeros_like(probs_LTE).scatter_(-1, probs_LTE.topk(num_chosen, dim=-1).indices, 1.0)
    shares_SE = groups.sequence_weights_ST @ ones_LTE.mean(0)
    mean_probs_SE = groups.global_weights_ST @ probs_LTE.mean(0)
    return (shares_SE * mean_probs_SE).sum() * probs_LTE.shape[-1]
