"""The stage's process group with one rank on the device: NCCL for tensors there, gloo for those of the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from llava_compete.train.distributed import Rank, all_or_none, of_main, process_group, this_rank

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rank(device: torch.device) -> Iterator[Rank]:
    rank = this_rank()
    assert rank.on_gpu == (device.type == "cuda")
    with process_group(rank):
        yield rank


def test_every_collective_that_sharding_uses_returns_what_went_in(rank: Rank, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.arange(8, device=device).to(dtype)
        reduced = given.clone()
        dist.all_reduce(reduced)
        gathered, scattered = torch.empty_like(given), torch.empty_like(given)
        dist.all_gather_into_tensor(gathered, given)
        dist.reduce_scatter_tensor(scattered, given)
        for found in (reduced, gathered, scattered):
            torch.testing.assert_close(found, given)


def test_words_between_ranks_do_not_need_the_device(rank: Rank) -> None:
    assert of_main({"steps": 3}) == {"steps": 3}
    with all_or_none(rank, "nothing"):
        pass
