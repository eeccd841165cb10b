"""The two nodes of losses against autograd through the plain functions, in float64."""

from __future__ import annotations

from typing import Any

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
T, L, E, K = 10, 3, 6, 2


def _groups() -> TokenGroups:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    groups = TokenGroups.from_mask(mask, num_sequences=3)
    for name, value in vars(groups).items():
        setattr(groups, name, value.double())
    return groups


def _scores() -> torch.Tensor:
    return torch.randn(T, L, E, dtype=torch.float64, requires_grad=True)


def _layers(loss: Any, *tensors: torch.Tensor) -> torch.Tensor:
    """A plain loss of each layer by itself, [L]."""
    groups = _groups()
    return torch.stack([loss(*(tensor[:, layer] for tensor in tensors), groups) for layer in range(L)])


COTANGENT = torch.tensor([5.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("own_scores", [False, True], ids=["softmax of logits", "softmax of other scores"])
@pytest.mark.parametrize("counted", [1, K])
def test_router_losses(counted: int, own_scores: bool) -> None:
    groups, logits = _groups(), _scores()
    scores = _scores() if own_scores else logits
    choices = scores.topk(counted).indices
    balance = _layers(losses.balance_loss, scores.softmax(-1), choices)
    z = _layers(losses.router_z_loss, logits)
    torch.testing.assert_close(z, groups.token_weights_T @ torch.logsumexp(logits, -1).square())
    expected = 0.3 * balance + 0.7 * z
    shares = losses.choice_shares(choices, scores, groups)
    found = losses.router_losses(logits, scores, shares, groups, COEFS)
    torch.testing.assert_close((found.aux_loss, found.balance_loss, found.router_z_loss), (expected, balance, z))
    leaves = [logits, scores] if own_scores else [logits]
    torch.testing.assert_close(
        torch.autograd.grad(found.aux_loss, leaves, COTANGENT), torch.autograd.grad(expected, leaves, COTANGENT)
    )


@pytest.mark.parametrize("counted", [1, K])
def test_competition_losses(counted: int) -> None:
    groups, logits, affinity = _groups(), _scores(), _scores()
    diversity = torch.randn(T, L, dtype=torch.float64, requires_grad=True)
    winners = affinity.topk(K).indices
    q = affinity.softmax(-1)
    squared = (logits.softmax(-1) - q.detach()).square()
    terms = {
        "distillation_loss": _layers(losses.distillation_loss, squared),
        "winner_distillation_loss": _layers(losses.winner_distillation_loss, squared, winners),
        "diversity_loss": _layers(losses.diversity_loss, diversity),
        "balance_loss": _layers(losses.balance_loss, q, winners[:, :, :counted]),
    }
    expected = sum(COMPETITION_COEFS[name] * term for name, term in terms.items())
    tensors = (logits, affinity, winners, winners[:, :, :counted], diversity)
    found = losses.competition_losses(*tensors, groups, COMPETITION_COEFS)
    torch.testing.assert_close(found._asdict(), {"aux_loss": expected, **terms})
    leaves = [logits, affinity, diversity]
    torch.testing.assert_close(
        torch.autograd.grad(found.aux_loss, leaves, COTANGENT), torch.autograd.grad(expected, leaves, COTANGENT)
    )


def test_a_logit_that_is_not_finite_shows_in_its_layer() -> None:
    groups = _groups()
    for number in (float("nan"), float("inf"), -float("inf")):
        logits = _scores().detach()
        logits[1, 2, 4] = number
        choices = torch.zeros(T, L, 1, dtype=torch.int64)
        shares = losses.choice_shares(choices, logits, groups)
        of_router = losses.router_losses(logits, logits, shares, groups, COEFS)
        tensors = (logits, _scores(), choices, choices, torch.zeros(T, L, dtype=torch.float64))
        of_competition = losses.competition_losses(*tensors, groups, COMPETITION_COEFS)
        for found in (of_router, of_competition):
            assert found.aux_loss.isfinite().tolist() == [True, True, False]
