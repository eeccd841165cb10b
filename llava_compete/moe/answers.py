"""What an expert usually says: a running mean of its outputs where it was chosen, to judge it by where it was not.

Default MoE (arXiv 2504.12463) keeps such means for its forward; here they only answer in backward (`judged.py`). A
forward leaves the step's sums (`Heard.sums`); the trainer adds them up over micro-batches and ranks, and ends the step.
Means are no part of the weights: the trainer keeps them in its checkpoints. Suffixes: T tokens, P pairs sorted by
expert, E experts, K chosen, I hidden, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_compete.moe.pairs import Pairs

DECAY = 0.9


class AnswerMeans:
    """`mean_EO`, float32, of tokens that count, unweighted, and `seen_E`; None until a first step has ended.

    A step's mean replaces the first one and moves a later one by 1 - 0.9; an expert without tokens keeps its mean, and
    one that never had any has none. Both tensors are replaced and never written to: a backward may still read them.
    """

    def __init__(self) -> None:
        self.mean_EO: Tensor | None = None
        self.seen_E: Tensor | None = None

    @torch.no_grad()
    def end_step(self, sums_EP: Tensor) -> None:
        """After an optimizer step, with `Heard.sums` [E, O + 1] of all micro-batches and ranks."""
        said_EO, count_E1 = sums_EP[:, :-1].float(), sums_EP[:, -1:].float()
        said_EO = said_EO / count_E1.clamp(min=1)
        heard_E = count_E1[:, 0] > 0
        if self.mean_EO is None or self.seen_E is None:
            self.mean_EO, self.seen_E = said_EO, heard_E
            return
        moved_EO = torch.where(self.seen_E[:, None], torch.lerp(said_EO, self.mean_EO, DECAY), said_EO)
        self.mean_EO = torch.where(heard_E[:, None], moved_EO, self.mean_EO)
        self.seen_E = self.seen_E | heard_E

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; nothing before a first step has ended."""
        if self.mean_EO is None or self.seen_E is None:
            return {}
        return {"mean": self.mean_EO, "seen": self.seen_E}

    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave."""
        self.mean_EO, self.seen_E = state.get("mean"), state.get("seen")


@torch.no_grad()
def answer_sums(
    hidden: Tensor, selected_TK: Tensor, counted_T: Tensor, down_EOI: Tensor, down_bias_EO: Tensor | None
) -> Tensor:
    """[E, O + 1], float32: the sum of each expert's outputs over the counted tokens that chose it, and their number.

    From sums of hidden states, since the down projection is linear: one row of it for each expert.

    Args:
        hidden: the chosen experts' hidden states by sorted pair [P, I], or all experts' [T, E, I].
        counted_T: 1 for a token that counts, else 0.
    """
    num_experts = len(down_EOI)
    if hidden.ndim == 2:
        pairs = Pairs.sort(selected_TK, num_experts)
        experts_E1 = torch.arange(num_experts, device=hidden.device, dtype=pairs.expert_P.dtype)[:, None]
        marks_EP = (pairs.expert_P == experts_E1) * counted_T.index_select(0, pairs.token_P)
        count_E, hidden_EI = marks_EP.sum(1), marks_EP.to(hidden.dtype) @ hidden
    else:
        marks_TE = counted_T.new_zeros(len(counted_T), num_experts)
        marks_TE = marks_TE.scatter_(1, selected_TK, counted_T[:, None].expand(selected_TK.shape))
        count_E, hidden_EI = marks_TE.sum(0), (marks_TE.to(hidden.dtype)[:, :, None] * hidden).sum(0)
    said_EO = torch.bmm(hidden_EI[:, None], down_EOI.transpose(1, 2))[:, 0].float()
    if down_bias_EO is not None:
        said_EO = said_EO + count_E[:, None] * down_bias_EO
    return torch.cat([said_EO, count_E[:, None]], 1)
