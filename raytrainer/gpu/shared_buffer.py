"""`SharedBuffer`: tensors in a memory segment, which a GPU copies to directly."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from raytrainer.gpu import pinned
from raytrainer.memory_segments import PIECE, Layout, Segment, Stretch, new_segment

__all__ = ["SharedBuffer"]

log = logging.getLogger("raytrainer")

#: That have pages come, at most: 8 GiB took one 1.75 s, and making them known to CUDA takes 0.46.
THREADS = 6


class SharedBuffer:
    """A segment in this process's memory, made known to CUDA. The process has it open until `close`.

    Args:
        layout: What lies where in it.
        device: What copies to it.
        adopted: The segment, where there is one; otherwise it is a new one.

    Raises:
        OSError: There is no such segment any more, or the system has no memory.
    """

    def __init__(self, layout: Layout, device: torch.device, adopted: Segment | None = None) -> None:
        self.layout = layout
        if adopted is None:
            number, self.segment = new_segment(max(1, layout.size))
        else:
            number = adopted.open()
            self.segment = Segment(adopted.name, adopted.size, ((os.getpid(), number),))
        self._close = weakref.finalize(self, os.close, number)
        mapping = mmap.mmap(number, self.segment.size, flags=mmap.MAP_SHARED)
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_DONTFORK)
        # without MADV_HUGEPAGE, with which 8 GiB took 2.6 s to come, rather than 1.75
        # as in `pinned.py`: tensors keep `held`, which keeps the mapping, and CUDA is to forget it before that goes
        held = (ctypes.c_char * self.segment.size).from_buffer(mapping)
        self._whole = torch.frombuffer(held, dtype=torch.uint8)
        known = []
        for stretch, came in self._pages(adopted is None):
            came.result()
            if device.type == "cuda" and self._register(stretch, device):
                known.append(self._whole.data_ptr() + stretch.begin)
        if known:
            weakref.finalize(held, _forget, known, device).atexit = False
        if device.type == "cuda" and len(known) < len(layout.stretches):
            log.warning("CUDA does not take main memory that processes share: copies of the state take longer.")

    def _pages(self, new: bool) -> Iterator[tuple[Stretch, Future[Any]]]:
        """Have the pages come, by several threads, as that takes long; those that are there are not written to."""
        with ThreadPoolExecutor(max(1, min(THREADS, (os.cpu_count() or 1) // 4))) as pool:

            def touch(stretch: Stretch) -> None:
                if new:
                    self._whole[stretch.begin : stretch.begin + stretch.size : mmap.PAGESIZE].zero_()

            asked = [(stretch, pool.submit(touch, stretch)) for stretch in self.layout.stretches]
            yield from asked

    def _register(self, stretch: Stretch, device: torch.device) -> bool:
        return pinned.register(self._whole.data_ptr() + stretch.begin, stretch.size, device)

    def tensor(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor in this piece's place, of whatever bytes are there."""
        begin, size = self.layout.at[key]
        assert size == math.prod(shape) * dtype.itemsize, key
        return self._whole[begin : begin + size].view(dtype).view(tuple(shape))

    def copy(self, key: str, data: Tensor) -> None:
        """Copy a tensor to its place, beside what the GPU does next."""
        place = self.tensor(key, data.dtype, data.shape)
        if place.nbytes <= PIECE:
            place.copy_(data, non_blocking=True)
            return
        count = PIECE // place.element_size()
        for part, own in zip(place.view(-1).split(count), data.reshape(-1).split(count), strict=True):
            part.copy_(own, non_blocking=True)  # within what CUDA knows as one

    def close(self) -> None:
        """The memory is the system's again, if no other process has it, and no tensor lies in it."""
        self._close()


def _forget(addresses: Sequence[int], device: torch.device) -> None:
    for address in addresses:
        pinned.unregister(address, device)
