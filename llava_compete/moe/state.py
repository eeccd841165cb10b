"""What the blocks of one model share: token statistics' groups, which layers compete, and the records of a forward.

The model's forward calls `begin` before a part runs and is inside `recording()`; a trainer callback sets `competing`
once an optimizer step. Recomputation under gradient checkpointing happens after `recording()` has ended, maybe after
other forwards: inside `checkpoint_contexts` blocks then do the same arithmetic, since modes are those of their forward,
but leave no second record. Nothing here is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llava_compete.moe.gradients import RouterGradients
    from llava_compete.moe.records import LayerStack, RoutingRecord


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


class RoutingState:
    """One per model, held by every block of it; a plain object, so it never enters a state dict."""

    def __init__(self) -> None:
        # Every layer has a key, always: torch.compile guards a set, or a dict's keys, as a whole, and another layer's
        # turn to compete would compile this layer's router step again. Of a dict's values it guards those it read.
        self._competes: dict[str, bool] = {}
        self.competition_enabled = False
        # A layer's router may read the logits of the layer before it in its part.
        self._before: dict[str, str] = {}
        self.logits: dict[str, Tensor] = {}
        # Of the layers with the coupling loss: what moves their proxies in this optimizer step, none without a trainer.
        self.noise: dict[str, Tensor] = {}
        self.records: dict[str, RoutingRecord] = {}
        # The same by layers that took the same kind of step, once a model's forward has put them side by side.
        self.stacks: dict[tuple[str, ...], LayerStack] = {}
        # Of the layers whose experts' usual answers are kept: sums of what they said in this forward (answers.py).
        self.answers: dict[str, Tensor] = {}
        self.groups: dict[str, TokenGroups] = {}
        # Where a step is to be measured: what its backward passes add their gradients' sizes to.
        self.gradients: RouterGradients | None = None
        self.is_recording = False
        self.recording_gradients = False

    def join(self, name: str) -> None:
        """Make a layer known under its name; each block does when it is built."""
        self._competes.setdefault(name, False)
        pairs = itertools.pairwise(sorted(self._competes, key=_place))
        self._before = {layer: before for before, layer in pairs if _place(before)[0] == _place(layer)[0]}

    def logits_before(self, name: str) -> Tensor | None:
        """The logits of the layer before `name` in its part in this forward; None for the first."""
        before = self._before.get(name)
        return None if before is None else self.logits[before]

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
        self.records, self.stacks, self.answers = {}, {}, {}
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

        Without this the blocks of a first forward would be recomputed with the second one's competitions, and get
        wrong gradients.
        """
        return nullcontext(), _Recomputation(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingState:
        """For averages of weights, which copy the model after a step: the last forward's tensors, which belong to a
        graph and cannot be copied, stay behind."""
        copy = memo[id(self)] = RoutingState()
        copy._competes, copy._before = dict(self._competes), dict(self._before)
        copy.competition_enabled = self.competition_enabled
        return copy


class _Moment(NamedTuple):
    competing: frozenset[str]
    competition_enabled: bool
    logits: dict[str, Tensor]


class _Recomputation(AbstractContextManager[None]):
    """Inside, `state` is as it was when this was made; may be entered again, by a second backward."""

    def __init__(self, state: RoutingState) -> None:
        self._state = state
        self._then = self._moment()

    def _moment(self) -> _Moment:
        # Logits of layers before are there when this is made; what runs inside adds its own, in a recomputation again.
        return _Moment(self._state.competing, self._state.competition_enabled, dict(self._state.logits))

    def _restore(self, moment: _Moment) -> None:
        self._state.competing, self._state.competition_enabled, self._state.logits = moment

    def __enter__(self) -> None:
        self._now = self._moment()
        self._restore(self._then)

    def __exit__(self, *exception: object) -> None:
        self._restore(self._now)


def _place(name: str) -> tuple[str, int]:
    part, number = name.split(".")
    return part, int(number)


def _scalar(value: int | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=device)
