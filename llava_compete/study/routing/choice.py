"""What a router of R runs decides, dense over experts. Suffixes: R runs, T tokens, E experts, S slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """Of a router: `scores_RTE` is what probabilities are the softmax of; a shared expert has weight but no logit. A
    router of more slots than experts (moe/slots.py) has the slots' logits, in `null_RT` the probability of running
    nothing, in `free_RTS` the weights of the slots that run no expert. Experts that choose themselves go on from
    `low_RTEH`, what each has computed."""

    logits_RTE: Tensor
    scores_RTE: Tensor
    chosen_RTE: Tensor  # bool
    first_RTE: Tensor  # bool, the best of the choice
    weights_RTE: Tensor
    null_RT: Tensor | None = None
    free_RTS: Tensor | None = None
    low_RTEH: Tensor | None = None


def largest(scores_RTE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each token and the largest alone, as masks [R, T, E]; equal scores may all be chosen."""
    first = scores_RTE.amax(-1, keepdim=True)
    least = first
    for _ in range(count - 1):
        least = scores_RTE.masked_fill(scores_RTE >= least, -torch.inf).amax(-1, keepdim=True)
    return scores_RTE >= least, scores_RTE >= first


def among(scores_RTE: Tensor, chosen_RTE: Tensor) -> Tensor:
    """Softmax over the chosen, 0 elsewhere."""
    return scores_RTE.masked_fill(~chosen_RTE, -torch.inf).softmax(-1)
