"""Freed memory goes back to the system when it is asked for, as the kernel counts it."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from llava_compete.moe.allocator import return_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_holes_go_back() -> None:
    process = psutil.Process()
    many = [torch.ones(2**14) for _ in range(2**11)]  # 64 KiB each: in the heap, not in pages of their own
    kept = many[1::2]
    full = process.memory_info().rss
    del many
    if not return_freed_memory(beyond=2**25):
        pytest.skip("malloc does not say what it holds, or the system's is another one")
    assert process.memory_info().rss < full - 2**25
    assert all(tensor.sum() == 2**14 for tensor in kept)
    assert not return_freed_memory(beyond=2**40)
