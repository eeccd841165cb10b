"""Which rows an epoch shows: each source's share by its weight, other rows of a source in each epoch.

A weight of 2 shows every row twice an epoch. A weight of 0.5 shows half of the rows in one epoch and the other half in
the next: the part of a weight below 1 goes round a shuffled list of the source's rows, so that none comes twice before
all have come once. A pure function of (seed, epoch, sources, weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


class Mixture:
    """The rows of each epoch of a data set whose rows lie source by source."""

    def __init__(self, sources: np.ndarray, weights: Sequence[float], seed: int) -> None:
        """`sources` int [N], ascending: the source of each row; `weights`: one for each source."""
        bounds = np.searchsorted(sources, np.arange(len(weights) + 1))
        self._seed = seed
        self._spans = [(int(first), int(last)) for first, last in itertools.pairwise(bounds)]
        self._shares = [divmod(weight, 1) for weight in weights]

    def rows_of(self, source: int) -> int:
        """Rows of one source in an epoch."""
        first, last = self._spans[source]
        copies, rest = self._shares[source]
        return int(copies) * (last - first) + round(rest * (last - first))

    def __len__(self) -> int:
        """Rows in an epoch."""
        return sum(map(self.rows_of, range(len(self._spans))))

    def epoch(self, number: int) -> np.ndarray:
        """Row numbers of one epoch, int64 [len(self)]; the sampler shuffles them."""
        parts = []
        for source, ((first, last), (copies, rest)) in enumerate(zip(self._spans, self._shares, strict=True)):
            rows = np.arange(first, last)
            parts += [rows] * int(copies)
            parts.append(first + self._round(source, last - first, round(rest * (last - first)), number))
        return np.concatenate(parts)

    def _round(self, source: int, count: int, share: int, epoch: int) -> np.ndarray:
        """`share` of `count` rows: the next ones of an endless sequence of shuffles, none twice in an epoch."""
        if share == 0:
            return np.zeros(0, dtype=np.int64)
        cycle, start = divmod(epoch * share, count)
        taken = self._shuffle(source, count, share, cycle)[start : start + share]
        left = share - len(taken)
        return np.concatenate([taken, self._shuffle(source, count, share, cycle + 1)[:left]]) if left else taken

    def _shuffle(self, source: int, count: int, share: int, cycle: int) -> np.ndarray:
        """The order of one round. An epoch that begins in the round before must not meet the same rows again here:
        those that it has had are put behind its others."""
        order = np.zeros(0, dtype=np.int64)
        for number in range(cycle + 1):
            shuffle = np.random.default_rng((self._seed, source, number)).permutation(count)
            begun = number * count % share  # rows that the epoch across the border took from the round before
            if begun:
                fresh = shuffle[~np.isin(shuffle, order[-begun:])][: share - begun]
                shuffle = np.concatenate([fresh, shuffle[~np.isin(shuffle, fresh)]])
            order = shuffle
        return order
