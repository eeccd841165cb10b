"""The sampler: each row once an epoch, and the same global batches however they are shared out."""

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from llava_compete.data.mixture import Mixture
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


@pytest.mark.parametrize("count", [2 * GLOBAL, 3 * GLOBAL + 5, 20 * GLOBAL + 7])
def test_batches_are_made_up_anew_in_each_epoch(count):
    lengths, modalities = rows(count)
    epochs = [global_batches(lengths, modalities, 1, GLOBAL, epoch) for epoch in range(8)]
    sets = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert all(not one & two for number, one in enumerate(sets) for two in sets[:number])


def test_the_smaller_last_batch_is_a_draw_like_any_other():
    """Not the longest rows of the last modality: over many epochs its mean length is that of all rows."""
    lengths, modalities = rows(10 * GLOBAL + 12)
    last = [epoch_order(lengths, modalities, GLOBAL, 0, epoch)[-12:] for epoch in range(200)]
    spread = lengths.std() / np.sqrt(200 * 12)
    assert abs(np.mean([lengths[batch].mean() for batch in last]) - lengths.mean()) < 4 * spread
    assert 0.5 < np.mean([modalities[batch].mean() for batch in last]) < 0.9


def test_a_weight_below_one_shows_every_row_before_any_twice():
    sources = np.repeat([0, 1, 2], [10, 7, 4])
    mixture = Mixture(sources, [0.5, 1.0, 2.25], seed=0)
    assert len(mixture) == 5 + 7 + 9
    epochs = [mixture.epoch(number) for number in range(4)]
    for shown in epochs:
        counts = np.bincount(shown, minlength=21)
        assert counts[:10].sum() == 5
        assert counts[:10].max() == 1
        assert (counts[10:17] == 1).all()
        assert sorted(counts[17:]) == [2, 2, 2, 3]
    halves = [frozenset(shown[shown < 10].tolist()) for shown in epochs]
    assert halves[0] | halves[1] == halves[2] | halves[3] == frozenset(range(10))
    assert halves[0] != halves[2]  # another shuffle in the next round
    assert sorted(np.concatenate([shown[21 - 4 - 1 :][-1:] for shown in epochs])) == [17, 18, 19, 20]
    np.testing.assert_array_equal(mixture.epoch(3), Mixture(sources, [0.5, 1.0, 2.25], seed=0).epoch(3))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), weight=st.floats(0.05, 3), seed=st.integers(0, 9))
def test_a_mixture_shows_rows_equally_often(count, weight, seed):
    mixture = Mixture(np.zeros(count, dtype=np.int32), [weight], seed)
    shown = np.zeros(count, dtype=np.int64)
    for epoch in range(12):
        rows_of_epoch = mixture.epoch(epoch)
        assert len(rows_of_epoch) == len(mixture)
        counts = np.bincount(rows_of_epoch, minlength=count)
        assert counts.max() - counts.min() <= 1
        shown += counts
    assert shown.max() - shown.min() <= 2


def test_the_sampler_takes_its_rows_from_the_mixture():
    lengths, modalities = rows(60)
    mixture = Mixture(np.repeat([0, 1], [40, 20]), [0.5, 2.0], seed=0)
    seen = []
    for epoch in range(2):
        samplers = [GlobalBatchSampler(lengths, modalities, 12, 3, 2, rank, 0, mixture) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
            assert (sampler.steps_per_epoch, len(sampler)) == (5, 10)
        seen.append(sorted(row for sampler in samplers for batch in sampler for row in batch))
        assert seen[-1] == sorted(mixture.epoch(epoch).tolist())
    assert seen[0] != seen[1]
