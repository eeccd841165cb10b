"""An interpolated bigram model: the yardstick that a language model must beat.

Absolute discounting with continuation counts below it (Kneser and Ney's bigram), over any integer symbols: the run's
own tokens, or bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_DISCOUNT = 0.75


class Bigram:
    """Counts of pairs over `vocabulary` symbols; documents are sequences of ids, pairs never cross documents."""

    def __init__(self, documents: Iterable[Sequence[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        pieces = [np.empty(0, dtype=np.int64)]
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)
            pieces.append(ids[:-1] * vocabulary + ids[1:])
        self.pairs, self.counts = np.unique(np.concatenate(pieces), return_counts=True)
        first, second = np.divmod(self.pairs, vocabulary)
        self.total_V = np.bincount(first, weights=self.counts, minlength=vocabulary)
        self.kinds_V = np.bincount(first, minlength=vocabulary)
        continuation_V = np.bincount(second, minlength=vocabulary) + 1.0
        self.backoff_V = continuation_V / continuation_V.sum()

    def log_probs(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.float64]:
        """Natural log-probability of each symbol of `after` behind the one at the same place in `before`."""
        keys = before * self.vocabulary + after
        places = np.minimum(np.searchsorted(self.pairs, keys), max(len(self.pairs) - 1, 0))
        counts = np.where(self.pairs[places] == keys, self.counts[places], 0) if len(self.pairs) else 0
        total = np.maximum(self.total_V[before], 1)
        seen = np.maximum(counts - _DISCOUNT, 0) / total
        rest = np.where(self.total_V[before] > 0, _DISCOUNT * self.kinds_V[before] / total, 1.0)
        return np.log(seen + rest * self.backoff_V[after])
