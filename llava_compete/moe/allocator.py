"""Keep freed memory in the process on CPU, as CUDA's caching allocator does on a GPU.

glibc gives each large tensor fresh pages and returns them at once, so a step pays a page fault for every 4 KiB it
touches: on a small virtual machine that is half the time of a mixture of experts. Called before training or measuring.
Only the largest tensors (embeddings, their gradients, logits) still come and go with pages of their own: kept, they
leave holes that small ones break up, and the process grows with each new length of rows. `return_freed_memory` returns
what has gathered in such holes all the same.
"""

from __future__ import annotations

import ctypes
import sys

# From malloc.h: how much free memory the heap's top may hold, and from which size on a block has pages of its own.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 2**20  # malloc's own limit for this setting
# Less than this is not worth the page faults of touching it again.
_MUCH_FREE = 256 * 2**20


def keep_freed_memory() -> bool:
    """Let malloc reuse freed memory (up to 2 GiB at the heap's top); False where malloc has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`; `fordblks` are the bytes of the heaps that are free."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def return_freed_memory(beyond: int = _MUCH_FREE) -> bool:
    """Return free pages to the system if the heaps hold more than `beyond` bytes of them; whether that was done.

    False too where malloc cannot say what it holds (musl, glibc before 2.33).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    try:
        library.mallinfo2.restype = _Mallinfo2
        free, trim = library.mallinfo2().fordblks, library.malloc_trim
    except AttributeError:
        return False
    return free > beyond and bool(trim(0))
