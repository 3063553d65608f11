"""How a worker's process keeps main memory."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_heap"]

#: Free memory at the heap's end that stays with the process. (glibc gives back all above 128 KiB, to begin with.)
KEPT = 256 << 20

#: Allocations below this size come from the heap, which is used again; 32 MiB is the most that glibc takes.
FROM_HEAP = 32 << 20

# numbers of mallopt's parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_SETTINGS_OF_OTHERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_heap() -> bool:
    """Have glibc keep memory that a step frees, since the next step will want it back; return whether it does.

    Otherwise each step may give memory back to the system and take it again, page by page: seen as 130 page faults a
    step in a worker that drives a GPU, and 550 to 1200 in one that trains a small GPT on a CPU. Other allocators, and
    environment variables that tell glibc what to do, are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS_OF_OTHERS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, FROM_HEAP) and mallopt(_M_TRIM_THRESHOLD, KEPT))
