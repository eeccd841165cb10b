"""What the blocks of one model share: token statistics' groups, which layers compete, and the records of a forward.

The model's forward calls `begin` before a part runs and is inside `recording()`; a trainer callback sets `competing`
once an optimizer step. Recomputation under gradient checkpointing happens after `recording()` has ended, maybe after
other forwards: inside `checkpoint_contexts` blocks then do the same arithmetic, since groups and modes are those of
their forward, but leave no second record. Nothing here is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from llava_compete.moe.precision import without_autocast


class TokenGroups:
    """Which sequence (image or sample) each of a part's T tokens belongs to, as weights of a mean; all float32.

    sequence_weights_ST: [S, T], 1/len(s) where token t of sequence s counts, else 0.
    num_sequences: 0-dim, sequences of the global batch (all ranks and micro-batches of an optimizer step); or [S, 1]
        where they have unequal shares in a mean over them: the inverse of each one's share.
    global_weights_ST: the same weights over `num_sequences`.
    token_weights_T: [T], their sum over sequences. A mean of x_T over sequences' means is
        `(token_weights_T * x_T).sum()`; the sum of it over micro-batches and ranks is the global mean.
    counted_T: [T], 1 for a token that takes part in statistics, else 0.
    num_counted, none: 0-dim, the number of these, and 0.

    All are made here, once a forward: each of a part's layers reads them several times.
    """

    def __init__(self, sequence_weights_ST: Tensor, num_sequences: Tensor) -> None:
        self.sequence_weights_ST = sequence_weights_ST
        self.num_sequences = num_sequences
        self.global_weights_ST = sequence_weights_ST / num_sequences
        self.token_weights_T = self.global_weights_ST.sum(0)
        self.counted_T = (self.token_weights_T > 0).float()
        self.num_counted = self.counted_T.sum()
        self.none = torch.zeros_like(self.num_counted)

    @classmethod
    def from_mask(cls, mask_BN: Tensor, num_sequences: int | Tensor | None = None) -> TokenGroups:
        """One sequence a row; a token counts where the mask is non-zero. Default `num_sequences`: rows with a token."""
        ids_BN = torch.arange(mask_BN.shape[0], device=mask_BN.device)[:, None].expand_as(mask_BN)
        return cls.from_ids(ids_BN.masked_fill(mask_BN == 0, -1), mask_BN.shape[0], num_sequences)

    @classmethod
    def from_ids(cls, ids_BN: Tensor, num_local: int, num_sequences: int | Tensor | None = None) -> TokenGroups:
        """Token t belongs to sequence `ids_BN.flatten()[t]` in 0..num_local-1; -1 takes part in nothing."""
        members_ST = ids_BN.reshape(1, -1) == torch.arange(num_local, device=ids_BN.device)[:, None]
        lengths_S = members_ST.sum(1, keepdim=True)
        if num_sequences is None:
            num_sequences = (lengths_S > 0).sum().clamp(min=1)
        return cls(members_ST.float() / lengths_S.clamp(min=1), _scalar(num_sequences, ids_BN.device))

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device | str | None = None) -> TokenGroups:
        """Tokens that take part in nothing: those of the dummy image of a text-only micro-batch."""
        return cls(torch.zeros(1, num_tokens, device=device), torch.ones((), device=device))


@dataclass
class RoutingMetrics:
    """Sums over a layer's counted tokens, detached and on device; sums of several (`+`, all-reduce) stay valid.

    load_E counts all K choices of the output actually computed; margin is the router's probability of its last
    chosen expert minus that of the best expert left out; dropped counts choices that add nothing to their token's
    output, for their weight is 0; recall counts winners that the router's top-K also has.
    """

    tokens: Tensor
    load_E: Tensor
    entropy_sum: Tensor
    margin_sum: Tensor
    dropped: Tensor
    recall_sum: Tensor
    competition_tokens: Tensor

    def __add__(self, other: RoutingMetrics) -> RoutingMetrics:
        return RoutingMetrics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def vector(self) -> Tensor:
        """All sums in one float32 vector [6 + E], to reduce over ranks in one collective."""
        return torch.cat([getattr(self, field.name).reshape(-1) for field in fields(self)])

    @classmethod
    def from_vector(cls, vector: Tensor) -> RoutingMetrics:
        """The inverse of `vector`."""
        return cls(vector[0], vector[1:-5], *vector[-5:])

    def summary(self) -> dict[str, float | list[float] | None]:
        """Means for a log line (synchronises with the device: once a logging step). Without tokens all are None."""
        tokens, competed = float(self.tokens), float(self.competition_tokens)
        load = [float(count) for count in self.load_E]
        choices = sum(load)
        return {
            "expert_load": [count / choices for count in load] if choices else None,
            "router_entropy": float(self.entropy_sum) / tokens if tokens else None,
            "router_margin": float(self.margin_sum) / tokens if tokens else None,
            "dropped": float(self.dropped),
            "router_agreement": float(self.recall_sum) / competed if competed else None,
        }


@dataclass
class RoutingObservation:
    """What `RoutingMetrics` are computed from, detached: the softmax's scores, the router's choices, and the experts
    that were used with their weights (on a competition step the winners)."""

    scores_TR: Tensor
    choices_TC: Tensor
    used_TK: Tensor
    weights_TK: Tensor
    num_experts: int
    competed: bool
    groups: TokenGroups

    @torch.no_grad()
    def metrics(self) -> RoutingMetrics:
        """All sums over counted tokens by one product of [T] with a column for each sum."""
        with without_autocast(self.scores_TR.device.type):
            probs_TR, groups = self.scores_TR.softmax(-1), self.groups
            used_TE = probs_TR.new_zeros(len(probs_TR), self.num_experts).scatter_(1, self.used_TK, 1.0)
            left_out_T1 = probs_TR.scatter(1, self.choices_TC, 0.0).amax(-1, keepdim=True)
            columns = [
                used_TE,
                torch.special.entr(probs_TR).sum(-1, keepdim=True),
                probs_TR.gather(1, self.choices_TC[:, -1:]) - left_out_T1,
                (self.weights_TK == 0).sum(-1, keepdim=True, dtype=probs_TR.dtype),
            ]
            if self.competed:  # winners that the router's choice also has
                columns.append(used_TE.gather(1, self.choices_TC).mean(-1, keepdim=True))
            sums = groups.counted_T @ torch.cat(columns, 1)
        load_E, rest = sums[: self.num_experts], sums[self.num_experts :]
        return RoutingMetrics(
            tokens=groups.num_counted,
            load_E=load_E,
            entropy_sum=rest[0],
            margin_sum=rest[1],
            dropped=rest[2],
            recall_sum=rest[3] if self.competed else groups.none,
            competition_tokens=groups.num_counted if self.competed else groups.none,
        )


@dataclass
class RoutingRecord:
    """One layer's forward: `aux_loss`, with gradient, is the sum of `losses` (unscaled) times their coefficients."""

    losses: dict[str, Tensor]
    aux_loss: Tensor
    observation: RoutingObservation

    @property
    def metrics(self) -> RoutingMetrics:
        """Computed when read: a dozen operators, which a step that nobody looks at does without."""
        return self.observation.metrics()


class RoutingState:
    """One per model, held by every block of it; a plain object, so it never enters a state dict."""

    def __init__(self) -> None:
        # Every layer has a key, always: torch.compile guards a set, or a dict's keys, as a whole, and another layer's
        # turn to compete would compile this layer's router step again. Of a dict's values it guards those it read.
        self._competes: dict[str, bool] = {}
        self.competition_enabled = False
        self.records: dict[str, RoutingRecord] = {}
        # Of the layers whose experts' usual answers are kept: sums of what they said in this forward (answers.py).
        self.answers: dict[str, Tensor] = {}
        self.groups: dict[str, TokenGroups] = {}
        self.is_recording = False
        self.recording_gradients = False

    def join(self, name: str) -> None:
        """Make a layer known under its name; each block does when it is built."""
        self._competes.setdefault(name, False)

    @property
    def competing(self) -> frozenset[str]:
        """Names of the layers that compete in this optimizer step, while competition is enabled."""
        return frozenset(name for name, competes in self._competes.items() if competes)

    @competing.setter
    def competing(self, names: Collection[str]) -> None:
        self._competes.update({name: name in names for name in {*self._competes, *names}})

    def begin(self, part: str, groups: TokenGroups) -> None:
        """Say how the tokens of `part` ("vision", "projector", "language"), about to run, group into sequences."""
        self.groups[part] = groups

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Drop the last forward's records; inside, each block leaves one under its name."""
        self.records, self.answers = {}, {}
        self.is_recording, self.recording_gradients = True, torch.is_grad_enabled()
        try:
            yield
        finally:
            self.is_recording = False

    def competes(self, name: str) -> bool:
        """Whether layer `name` holds a competition in this step."""
        return self.competition_enabled and self._competes[name]

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of torch's checkpoint: the recomputation sees the state as its forward, now, sees it.

        Without this the blocks of a first forward would be recomputed with the second one's groups and competitions,
        and their routers get wrong gradients.
        """
        return nullcontext(), _Recomputation(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingState:
        """For averages of weights, which copy the model after a step: the last forward's tensors, which belong to a
        graph and cannot be copied, stay behind."""
        copy = memo[id(self)] = RoutingState()
        copy._competes = dict(self._competes)
        copy.competition_enabled = self.competition_enabled
        return copy


class _Recomputation(AbstractContextManager[None]):
    """Inside, `state` is as it was when this was made; may be entered again, by a second backward."""

    def __init__(self, state: RoutingState) -> None:
        self._state = state
        self._then = self._moment()

    def _moment(self) -> tuple[dict[str, TokenGroups], frozenset[str], bool]:
        return dict(self._state.groups), self._state.competing, self._state.competition_enabled

    def _restore(self, moment: tuple[dict[str, TokenGroups], frozenset[str], bool]) -> None:
        self._state.groups, self._state.competing, self._state.competition_enabled = moment

    def __enter__(self) -> None:
        self._now = self._moment()
        self._restore(self._then)

    def __exit__(self, *exception: object) -> None:
        self._restore(self._now)


def _scalar(value: int | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device)
