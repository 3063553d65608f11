"""How a worker's process keeps memory that it has freed: the main one, and that of its GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform

import torch

__all__ = ["give_back_memory", "keep_heap"]

#: Bytes that torch's allocator may keep of a GPU between runs: taking them again would make the next one start later.
CACHE_KEPT = 256 << 20

#: Free memory at a heap's end that stays with the process. (glibc gives back all above 128 KiB, to begin with.)
KEPT = 256 << 20

#: Allocations below this size come from a heap, which is used again; 32 MiB is the most that glibc takes.
FROM_HEAP = 32 << 20

# numbers of mallopt's parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_SETTINGS_OF_OTHERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_heap() -> None:
    """Have glibc keep memory that a step frees, since the next step will want it back.

    Otherwise each step may give memory back to the system and take it again, page by page: seen as 550 to 1200 page
    faults a step in a worker that trains a small GPT on a CPU. Environment variables that tell glibc what to do win.
    Processes forked from this one do the same.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS_OF_OTHERS):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, FROM_HEAP)
    mallopt(_M_TRIM_THRESHOLD, KEPT)


def give_back_memory(device: torch.device) -> None:
    """Between runs, give back what the last one held, and what torch's allocator keeps of a GPU, unless it is little.

    A run's objects know each other, so that gradients, optimizers' states and DDP's buckets would wait for Python to
    look for cycles, which it does when there are many new objects, however large they are.
    """
    gc.collect()
    if device.type != "cuda":
        return
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if unused > CACHE_KEPT:
        with contextlib.suppress(RuntimeError):  # CUDA refuses everything after some errors, which are told
            torch.cuda.empty_cache()
