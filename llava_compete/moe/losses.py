"""The auxiliary losses of routing, each a plain function (design: distillation, diversity, balance, z).

Every mean over tokens is taken within a sequence first, then over the sequences of the global batch; `TokenGroups`
carries both, so padding has no weight and any cut into micro-batches gives the same sum. All inputs are float32.
Suffixes: T tokens, E experts, K chosen. Called by `SparseMoeBlock`; CompeteSMoE, arXiv 2505.13380, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.moe.state import TokenGroups


def balance_loss(probs_TE: Tensor, choices_TC: Tensor, groups: TokenGroups) -> Tensor:
    """E² x mean over (sequence, expert) of mean probability x mean share of choices; 1 when both are uniform.

    `choices_TC` [T, C]: the choices that count, the first alone (C = 1) or all.
    """
    num_experts = probs_TE.shape[1]
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, choices_TC, 1.0 / choices_TC.shape[1])
    mean_probs_SE = groups.sequence_weights_ST @ probs_TE
    mean_chosen_SE = groups.sequence_weights_ST @ chosen_TE
    return num_experts * (mean_probs_SE * mean_chosen_SE).sum() / groups.num_sequences


def router_z_loss(logits_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of logsumexp(logits)²."""
    return _token_mean(torch.logsumexp(logits_TE, dim=-1).square(), groups)


def distillation_loss(probs_TE: Tensor, affinity_probs_TE: Tensor, groups: TokenGroups) -> Tensor:
    """Mean over (token, expert) of (p - q)²; the target q is detached here."""
    return _token_mean((probs_TE - affinity_probs_TE.detach()).square().mean(-1), groups)


def winner_distillation_loss(
    probs_TE: Tensor, affinity_probs_TE: Tensor, winners_TK: Tensor, groups: TokenGroups
) -> Tensor:
    """The same mean over the winners of the competition only."""
    difference_TE = probs_TE - affinity_probs_TE.detach()
    return _token_mean(difference_TE.gather(1, winners_TK).square().mean(-1), groups)


def diversity_loss(diversity_T: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of `token_diversity`, which the competition pass computes while it has the winners' outputs."""
    return _token_mean(diversity_T, groups)


def token_diversity(outputs_TKO: Tensor) -> Tensor:
    """[T]: mean over all K x K cells of the cosine between two winners' outputs, the diagonal counted as 0.

    A winner's row of cells sums to its direction times the sum of the others'; a K x K product for each token would
    cost several times more on CPU.
    """
    directions_TKO = F.normalize(outputs_TKO.float(), dim=-1)
    others_TKO = directions_TKO.sum(1, keepdim=True) - directions_TKO
    return (directions_TKO * others_TKO).sum((1, 2)) / directions_TKO.shape[1] ** 2


def _token_mean(values_T: Tensor, groups: TokenGroups) -> Tensor:
    return (groups.token_weights_T * values_T).sum()
