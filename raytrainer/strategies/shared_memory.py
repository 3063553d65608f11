"""Memory that all workers of one host map: it has no name, so it goes with the last of them, however they end."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["shared_memory"]


def shared_memory(store: Any, name: str, rank: int, size: int, control: Any) -> mmap.mmap | None:
    """Memory of `size` bytes, all zero; None: not all workers can map the same. All make it together.

    Its file is removed before anybody uses it.

    Args:
        store: That all workers share.
        name: What it is told by in there; another one each time.
        rank: This worker's.
        size: Bytes.
        control: A gloo group of all.
    """
    path, file, whole = "", -1, False
    if rank == 0:
        with contextlib.suppress(OSError):
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            file, path = tempfile.mkstemp(prefix="raytrainer-shared-", dir=folder)
            # takes its memory now: where there is none, the first to write to it later would be ended by a signal
            whole = _filled(file, size)
        store.set(name, path if whole else "")
    elif there := store.get(name).decode():
        with contextlib.suppress(OSError):
            file, whole = os.open(there, os.O_RDWR), True
    numbers = _numbers_of_processes()
    every = torch.tensor([int(whole), numbers, -numbers])
    try:
        dist.all_reduce(every, op=dist.ReduceOp.MIN, group=control)
        together = every[0] and every[1] == -every[2]
        return mmap.mmap(file, size) if together else None
    finally:  # also where another worker is lost meanwhile
        if file >= 0:
            os.close(file)
        if path:
            with contextlib.suppress(OSError):  # Windows keeps what is mapped
                os.unlink(path)


def _filled(file: int, size: int) -> bool:
    """Write so many zeros; whether all of them are there."""
    left, zeros = size, bytes(min(size, 2**20))
    while left:
        written = os.write(file, zeros[:left])
        if not written:
            return False
        left -= written
    return True


def _numbers_of_processes() -> int:
    """The same for all workers that know processes by the same numbers; those in containers of their own do not."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
