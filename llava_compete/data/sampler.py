"""Which rows form which batch: a pure function of (seed, epoch, lengths, modalities, mixture, global batch size).

Global batches do not depend on how many ranks, micro-batches or accumulation steps share them: those only slice.
Inside a global batch rows are sorted by modality and length, so that a micro-batch is all image or all text where the
mix allows, with little padding; the order of global batches is shuffled. Each row of the epoch comes exactly once; the
last global batch may be smaller: its micro-batches get as equal shares as possible, and one without rows is an empty
list, which the collator turns into a filler. Everything is numpy: no Python list as long as the data set.

On resume the Trainer drops the first row numbers of the epoch (accelerate's `skip_first_batches`), so that no row and
no image of them is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llava_compete.data.mixture import Mixture

_MEGABATCH = 32  # at most so many global batches are sorted by length together
_MIN_MEGABATCHES = 8  # and at least so many times in an epoch, or few rows would meet in the same batches every time


def epoch_order(
    lengths: np.ndarray, modalities: np.ndarray, global_batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """All row numbers in the order of one epoch: int64 [N]; batch b is [b·G, (b+1)·G)."""
    count, batch = len(lengths), global_batch_size
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(count)
    full = count // batch

    def sort(part: slice) -> None:
        chunk = order[part]
        order[part] = chunk[np.lexsort((lengths[chunk], modalities[chunk]))]

    # Shuffled rows are cut into chunks of whole batches and sorted by (modality, length) inside each: batches get rows
    # of similar length and mostly one modality, while their make-up differs from epoch to epoch. What is left for the
    # smaller last batch is drawn before the sort: after it, that would always be the longest rows.
    size = batch * min(_MEGABATCH, max(1, full // _MIN_MEGABATCHES))
    for start in range(0, full * batch, size):
        sort(slice(start, min(start + size, full * batch)))
    sort(slice(full * batch, count))
    shuffled = rng.permutation(full)
    return np.concatenate([order[: full * batch].reshape(full, batch)[shuffled].reshape(-1), order[full * batch :]])


class GlobalBatchSampler:
    """Iterates the micro-batches (lists of row numbers) of one rank; global batch after global batch.

    A global batch of G rows is G // (micro_batch_size · world_size) accumulation steps; micro-batch a of rank r holds
    the rows [(a·world_size + r)·micro_batch_size, …) of it. A smaller last batch is spread over the same number of
    micro-batches as evenly as possible, and each has at least one row where there are enough.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        modalities: np.ndarray,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
        seed: int,
        mixture: Mixture | None = None,
    ) -> None:
        """`lengths` and `modalities` [N] of the data set's rows; `mixture`: those of an epoch, by default each once."""
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"global batch size {global_batch_size} is not a multiple of micro-batch {micro_batch_size} "
                f"× world size {world_size}"
            )
        self.lengths, self.modalities = lengths, modalities
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.world_size, self.rank, self.seed, self.mixture = world_size, rank, seed, mixture
        self.accumulation_steps = global_batch_size // (micro_batch_size * world_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the smaller last one included."""
        rows = len(self.lengths) if self.mixture is None else len(self.mixture)
        return -(-rows // self.global_batch_size)

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self.steps_per_epoch * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        lengths, modalities = self.lengths, self.modalities
        if self.mixture is not None:
            shown = self.mixture.epoch(self.epoch)
            lengths, modalities = lengths[shown], modalities[shown]
        order = epoch_order(lengths, modalities, self.global_batch_size, self.seed, self.epoch)
        order = order if self.mixture is None else shown[order]
        for step in range(self.steps_per_epoch):
            rows = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
            micro_batches = np.array_split(rows, self.accumulation_steps * self.world_size)
            for accumulation in range(self.accumulation_steps):
                yield micro_batches[accumulation * self.world_size + self.rank].tolist()
