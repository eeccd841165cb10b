"""Which experts the loss is asked about in a step of R runs, and what answers for those that are not run.

Estimates are of the steps before, so that a step asks what it has not yet changed. Suffixes: R runs, T tokens, D width
in, E experts, F groups of tokens that have a mean of their own, I hidden, O out, X = D + 1 with a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_compete.study.routing.choice import Choice, largest
from llava_compete.study.routing.mixture import Question
from llava_compete.study.routing.rules import Judge, Rule

_MARGIN_STEP = 1.05
_RIDGE = 1e-3


class Judging:
    """Of one layer; `key` is its place, 0 the first. `progress`: share of the training's steps that is over."""

    progress = 0.0

    def __init__(self, rule: Rule, key: int, sizes: tuple[int, int, int], device: str):
        judge, (runs, experts, hidden) = rule.judge, sizes
        self.judge, self.key = judge or Judge(), key
        self.learns = rule.router == "default_moe" or self.judge.answers != "full"
        groups = experts if self.judge.estimate == "pair" else 1
        self.means_RFEO = torch.zeros(runs, groups, experts, hidden, device=device)
        self.seen_RFE = torch.zeros(runs, groups, experts, dtype=torch.bool, device=device)
        self.margin_R11 = torch.full((runs, 1, 1), self.judge.margin, device=device)
        self.near_R = torch.zeros(runs, device=device)
        if self.judge.estimate == "linear":
            self.squares_REXX = torch.zeros(runs, experts, hidden + 1, hidden + 1, device=device)
            self.products_REXO = torch.zeros(runs, experts, hidden + 1, hidden, device=device)

    @torch.no_grad()
    def question(self, x_RTD: Tensor, choice: Choice, judging_R: Tensor) -> Question:
        """Of the runs marked in `judging_R`, the others with strength 0."""
        judge, chosen = self.judge, choice.chosen_RTE
        probs = choice.logits_RTE.softmax(-1)
        least = probs.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
        near = (probs >= self._margin() * least) & ~chosen
        if judge.contenders is not None:
            near &= largest(probs.masked_fill(chosen, -1.0), judge.contenders)[0]
        self.near_R = near.sum(-1).float().mean(1)
        asked, estimated, estimate = near, None, None
        if judge.answers != "full":
            group_RTF = self._group(choice)
            seen = torch.matmul(group_RTF, self.seen_RFE.to(group_RTF.dtype)) > 0
            asked = near if judge.answers == "both" else torch.zeros_like(near)
            estimated = seen & ~chosen & (~near if judge.answers == "both" else near)
            estimate = self._estimate(x_RTD, group_RTF)
        strength = judging_R.float().view(-1, 1, 1)
        if judge.relative:
            strength = strength / (probs * chosen).sum(-1, keepdim=True)
        last = chosen & (probs <= least) if judge.baseline == "last" else None
        return Question(choice.logits_RTE, asked, chosen, strength, judge.baseline, estimated, estimate, last)

    def _margin(self) -> float | Tensor:
        judge = self.judge
        if judge.contested is not None:
            return self.margin_R11
        start = judge.margin if self.key == 0 or judge.deep_margin is None else judge.deep_margin
        return start if judge.last_margin is None else start + self.progress * (judge.last_margin - start)

    def _group(self, choice: Choice) -> Tensor:
        """[R, T, F]: which group of means a token asks."""
        first = choice.first_RTE.float()
        return first if self.judge.estimate == "pair" else torch.ones_like(first[..., :1])

    def _estimate(self, x_RTD: Tensor, group_RTF: Tensor) -> Callable[[Tensor], Tensor]:
        """g [R, T, O] -> <g, estimate of Y_e> [R, T, E], with what is known now."""
        groups, experts, width = self.means_RFEO.shape[1:]
        if self.judge.estimate == "linear":
            size = self.squares_REXX.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-6)
            ridge = torch.eye(width + 1, device=size.device) * (_RIDGE * size)[..., None, None]
            map_XEO = torch.linalg.solve(self.squares_REXX + ridge, self.products_REXO).transpose(1, 2).flatten(2)
            answers = torch.bmm(_with_one(x_RTD), map_XEO).unflatten(2, (experts, width))
            return lambda grad: torch.einsum("rteo,rto->rte", answers, grad)
        means_RSO, scale = self.means_RFEO.flatten(1, 2), self._scale(x_RTD)

        def by_mean(grad: Tensor) -> Tensor:
            every = torch.bmm(grad, means_RSO.transpose(1, 2)).unflatten(2, (groups, experts))
            return (every * group_RTF.unsqueeze(-1)).sum(2) * scale

        return by_mean

    def _scale(self, x_RTD: Tensor) -> Tensor:
        """[R, T, 1]: to what an answer is taken to be in proportion."""
        norms = x_RTD.norm(dim=-1, keepdim=True)
        return norms if self.judge.estimate == "norm" else torch.ones_like(norms)

    @torch.no_grad()
    def end_step(self, x_RTD: Tensor, hidden_RTEI: Tensor, down_REIO: Tensor, choice: Choice) -> None:
        """Learn from the answers of experts that were chosen, and move a margin that holds a share."""
        judge, chosen = self.judge, choice.chosen_RTE.float()
        if judge.contested is not None:
            self.margin_R11 *= _MARGIN_STEP ** torch.sign(self.near_R - judge.contested).view(-1, 1, 1)
            self.margin_R11.clamp_(max=1.0)
        if not self.learns:
            return
        if judge.estimate == "last":
            probs = choice.logits_RTE.masked_fill(~choice.chosen_RTE, torch.inf)
            chosen = chosen * (probs <= probs.amin(-1, keepdim=True))
        # A pair's means are over the tokens that chose both.
        group = choice.chosen_RTE.float() if judge.estimate == "pair" else self._group(choice)
        who_RTFE = group.unsqueeze(-1) * chosen.unsqueeze(2)
        count_RFE = who_RTFE.sum(1)
        now, before = count_RFE > 0, self.seen_RFE
        if judge.estimate == "linear":
            self._regress(x_RTD, hidden_RTEI, down_REIO, chosen)
        else:
            scaled = who_RTFE / self._scale(x_RTD).unsqueeze(-1)
            mean_hidden = torch.einsum("rtfe,rtei->rfei", scaled, hidden_RTEI) / count_RFE.clamp(min=1).unsqueeze(-1)
            answer = torch.einsum("rfei,reio->rfeo", mean_hidden, down_REIO)
            moved = torch.where(
                before.unsqueeze(-1), judge.decay * self.means_RFEO + (1 - judge.decay) * answer, answer
            )
            self.means_RFEO = torch.where(now.unsqueeze(-1), moved, self.means_RFEO)
        self.seen_RFE = before | now

    def _regress(self, x_RTD: Tensor, hidden_RTEI: Tensor, down_REIO: Tensor, chosen: Tensor) -> None:
        """Moments of the tokens that chose an expert and of its answers, for least squares."""
        with_one = _with_one(x_RTD)
        own_RETX = chosen.transpose(1, 2).unsqueeze(-1) * with_one.unsqueeze(1)
        squares = own_RETX.transpose(2, 3) @ with_one.unsqueeze(1)
        products = (own_RETX.transpose(2, 3) @ hidden_RTEI.transpose(1, 2)) @ down_REIO
        self.squares_REXX = self.judge.decay * self.squares_REXX + squares
        self.products_REXO = self.judge.decay * self.products_REXO + products


def _with_one(x_RTD: Tensor) -> Tensor:
    return F.pad(x_RTD, (0, 1), value=1.0)
