"""The two nodes of losses against autograd through the plain functions, in float64."""

from __future__ import annotations

import pytest
import torch

from llava_compete.moe import losses
from llava_compete.moe.state import TokenGroups

COEFS = {"balance_loss": 0.3, "router_z_loss": 0.7}
COMPETITION_COEFS = {
    "distillation_loss": 0.3,
    "winner_distillation_loss": 0.7,
    "diversity_loss": 0.2,
    "balance_loss": 1.1,
}
T, E, K = 10, 6, 2


def _groups() -> TokenGroups:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    groups = TokenGroups.from_mask(mask, num_sequences=3)
    for name, value in vars(groups).items():
        setattr(groups, name, value.double())
    return groups


def _scores() -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("own_scores", [False, True], ids=["softmax of logits", "softmax of other scores"])
@pytest.mark.parametrize("counted", [1, K])
def test_router_losses(counted: int, own_scores: bool) -> None:
    groups, logits = _groups(), _scores()
    scores = _scores() if own_scores else logits
    choices = scores.topk(counted).indices
    balance = losses.balance_loss(scores.softmax(-1), choices, groups)
    z = losses.router_z_loss(logits, groups)
    torch.testing.assert_close(z, (groups.token_weights_T * torch.logsumexp(logits, -1).square()).sum())
    expected = 0.3 * balance + 0.7 * z
    found = losses.router_losses(logits, scores, choices, groups, COEFS)
    torch.testing.assert_close((found.aux_loss, found.balance_loss, found.router_z_loss), (expected, balance, z))
    leaves = [logits, scores] if own_scores else [logits]
    torch.testing.assert_close(
        torch.autograd.grad(5 * found.aux_loss, leaves), torch.autograd.grad(5 * expected, leaves)
    )


@pytest.mark.parametrize("counted", [1, K])
def test_competition_losses(counted: int) -> None:
    groups, logits, affinity = _groups(), _scores(), _scores()
    diversity = torch.randn(T, dtype=torch.float64, requires_grad=True)
    winners = affinity.topk(K).indices
    q = affinity.softmax(-1)
    squared = (logits.softmax(-1) - q.detach()).square()
    terms = {
        "distillation_loss": losses.distillation_loss(squared, groups),
        "winner_distillation_loss": losses.winner_distillation_loss(squared, winners, groups),
        "diversity_loss": losses.diversity_loss(diversity, groups),
        "balance_loss": losses.balance_loss(q, winners[:, :counted], groups),
    }
    expected = sum(COMPETITION_COEFS[name] * term for name, term in terms.items())
    tensors = (logits, affinity, winners, winners[:, :counted], diversity)
    found = losses.competition_losses(*tensors, groups, COMPETITION_COEFS)
    torch.testing.assert_close(found._asdict(), {"aux_loss": expected, **terms})
    leaves = [logits, affinity, diversity]
    torch.testing.assert_close(
        torch.autograd.grad(5 * found.aux_loss, leaves), torch.autograd.grad(5 * expected, leaves)
    )


def test_a_logit_that_is_not_finite_shows() -> None:
    groups = _groups()
    for number in (float("nan"), float("inf"), -float("inf")):
        logits = _scores().detach()
        logits[1, 4] = number
        choices = torch.zeros(T, 1, dtype=torch.int64)
        assert not losses.router_losses(logits, logits, choices, groups, COEFS).aux_loss.isfinite()
        tensors = (logits, _scores(), choices, choices, torch.zeros(T, dtype=torch.float64))
        assert not losses.competition_losses(*tensors, groups, COMPETITION_COEFS).aux_loss.isfinite()
