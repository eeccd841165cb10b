"""Keep freed memory in the process on CPU, as CUDA's caching allocator does on a GPU.

glibc gives each large tensor fresh pages and returns them at once, so a step pays a page fault for every 4 KiB it
touches: on a small virtual machine that is half the time of a mixture of experts. Called before training or measuring.
Only the largest tensors (embeddings, their gradients, logits) still come and go with pages of their own: kept, they
leave holes that small ones break up, and the process grows with each new length of rows.
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h: how much free memory the heap's top may hold, and from which size on a block has pages of its own.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20  # malloc's own limit for this setting


def keep_freed_memory() -> bool:
    """Let malloc reuse freed memory (up to 2 GiB at the heap's top); False where malloc has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
