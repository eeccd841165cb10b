"""The sampler: each row once an epoch, and the same global batches however they are shared out."""

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from llava_compete.data.sampler import GlobalBatchSampler, epoch_order

GLOBAL = 24


def rows(count, seed=0, share_text=0.3):
    rng = np.random.default_rng(seed)
    modalities = (rng.random(count) > share_text).astype(np.int8)
    return rng.integers(5, 400, count).astype(np.int32), modalities


def global_batches(lengths, modalities, world, micro, epoch=0, seed=0):
    """Rows of each optimizer step, joined over ranks and micro-batches."""
    samplers = []
    for rank in range(world):
        sampler = GlobalBatchSampler(lengths, modalities, GLOBAL, micro, world, rank, seed)
        sampler.set_epoch(epoch)
        samplers.append(list(sampler))
        assert len(samplers[-1]) == len(sampler)
    steps = GLOBAL // (world * micro)
    assert len({len(batches) for batches in samplers}) == 1
    return [
        [row for a in range(at, at + steps) for rank in range(world) for row in samplers[rank][a]]
        for at in range(0, len(samplers[0]), steps)
    ]


GRID = [(world, micro) for world in (1, 2, 3, 4, 8) for micro in (1, 2, 3, 6, 12, 24) if GLOBAL % (world * micro) == 0]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 99), epoch=st.integers(0, 3), shape=st.sampled_from(GRID))
def test_each_row_once_and_batches_independent_of_their_split(count, seed, epoch, shape):
    lengths, modalities = rows(count, seed)
    batches = global_batches(lengths, modalities, *shape, epoch=epoch, seed=seed)
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    order = epoch_order(lengths, modalities, GLOBAL, seed, epoch)
    for step, batch in enumerate(batches):
        assert batch == order[step * GLOBAL : (step + 1) * GLOBAL].tolist()
    assert [len(batch) for batch in batches[:-1]] == [GLOBAL] * (len(batches) - 1)


def test_epochs_and_seeds_differ_and_repeat():
    lengths, modalities = rows(500)
    first = epoch_order(lengths, modalities, GLOBAL, 0, 0)
    np.testing.assert_array_equal(first, epoch_order(lengths, modalities, GLOBAL, 0, 0))
    assert not np.array_equal(first, epoch_order(lengths, modalities, GLOBAL, 0, 1))
    assert not np.array_equal(first, epoch_order(lengths, modalities, GLOBAL, 1, 0))


class NeverRead(Dataset):
    """Row numbers; reading one of the `forbidden` is a failure."""

    def __init__(self, count, forbidden):
        self.count, self.forbidden = count, forbidden

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        assert row not in self.forbidden
        return row


@pytest.mark.parametrize("start", [1, 7, 20])
def test_resuming_is_slicing(start):
    """As the Trainer resumes: accelerate skips micro-batches of row numbers, the epoch is set, nothing else is read."""
    lengths, modalities = rows(500)
    whole = global_batches(lengths, modalities, world=2, micro=4, epoch=1)
    seen = {row for batch in whole[:start] for row in batch}
    rest = []
    for rank in range(2):
        sampler = GlobalBatchSampler(lengths, modalities, GLOBAL, 4, 2, rank, 0)
        loader = DataLoader(NeverRead(500, seen), batch_sampler=sampler, collate_fn=list)
        resumed = skip_first_batches(loader, start * sampler.accumulation_steps)
        sampler.set_epoch(1)
        rest.append(list(resumed))
    joined = [micro for pair in zip(*rest, strict=True) for micro in pair]
    assert [row for micro in joined for row in micro] == [row for batch in whole[start:] for row in batch]


def test_micro_batches_are_of_one_modality_and_similar_length():
    lengths, modalities = rows(20_000)
    sampler = GlobalBatchSampler(lengths, modalities, 64, 16, 1, 0, seed=0)
    batches = [np.asarray(batch) for batch in sampler if len(batch) == 16]
    mixed = sum(len(set(modalities[batch].tolist())) > 1 for batch in batches)
    assert mixed <= 0.02 * len(batches)
    used = sum(lengths[batch].sum() for batch in batches)
    padded = sum(16 * lengths[batch].max() for batch in batches)
    assert used / padded > 0.95  # in random order it is about one half


def test_a_short_last_batch_gives_every_rank_the_same_number_of_micro_batches():
    lengths, modalities = rows(GLOBAL + 2)
    shared = [list(GlobalBatchSampler(lengths, modalities, GLOBAL, 3, 4, rank, 0)) for rank in range(4)]
    assert [len(batches) for batches in shared] == [4] * 4
    assert sum(len(batches[i]) for batches in shared for i in (2, 3)) == 2


def test_a_geometry_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        GlobalBatchSampler(*rows(10), 24, 5, 2, 0, 0)


def test_665_thousand_rows_take_little_time_and_memory():
    lengths, modalities = rows(665_000)
    order = epoch_order(lengths, modalities, 128, 0, 0)
    assert order.nbytes < 6e6
    assert np.array_equal(np.sort(order), np.arange(665_000))
