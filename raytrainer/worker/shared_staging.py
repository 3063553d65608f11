"""`SharedStaging`: a worker's shards, copied to memory that outlives it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from raytrainer.gpu.shared_buffer import SharedBuffer
from raytrainer.memory_segments import Handed, lay_out

__all__ = ["SharedStaging"]

log = logging.getLogger("raytrainer")

#: Seconds that the process of a lost worker gets to end, before its memory is left alone.
ENDING = 10.0


class SharedStaging:
    """Memory segments, one for each state that is kept. The driver says which one a state goes to.

    Args:
        device: Where most of what is copied is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, SharedBuffer] = {}
        self._thread: threading.Thread | None = None  # which takes memory, beside training

    def reserve(self, pieces: Mapping[str, Mapping[str, Any]], slot: int = 0) -> None:
        """Have a thread take the memory for these pieces, if it is not there yet."""
        sizes = _sizes(pieces)
        if self._thread is not None and self._thread.is_alive():
            return
        self._beside(lambda: self._buffer(slot, sizes))

    def reserve_like(self, slot: int, other: int) -> None:
        """Have a thread take memory for what is in the `other` slot."""

        def take() -> None:
            if slot not in self._buffers and other in self._buffers:
                self._buffer(slot, {key: size for key, (_, size) in self._buffers[other].layout.at.items()})

        self._beside(take)

    def _beside(self, action: Callable[[], object]) -> None:
        before = self._thread

        def act() -> None:
            if before is not None:
                before.join()
            with contextlib.suppress(Exception):  # the copy that needs the memory will say so
                action()

        self._thread = threading.Thread(target=act, name="raytrainer-share", daemon=True)
        self._thread.start()

    def _await_thread(self) -> None:
        """Also for one that begins meanwhile, as another thread may ask for more."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def copy(self, slot: int, pieces: Mapping[str, Mapping[str, Any]]) -> Handed:
        """Copy the pieces' tensors; where they are now. What was in this slot before is gone."""
        self._await_thread()
        buffer = self._buffer(slot, _sizes(pieces))
        try:
            with torch.no_grad():
                for key, piece in pieces.items():
                    buffer.copy(key, piece["data"].detach())
        finally:
            if self._device.type == "cuda":  # also before the memory of a failed copy may go
                torch.cuda.current_stream(self._device).synchronize()
        return Handed(buffer.segment, buffer.layout)

    def adopt(self, kept: Mapping[int, Handed], former: Collection[int]) -> None:
        """Take over the memory of a worker whose place this one has, beside training. If it is its own, it has it.

        Args:
            kept: What was in each slot, wherever it is.
            former: Processes that have had this memory. One that has not ended may still write there, and keeps it:
                this one then takes other memory when it needs some.
        """
        own = self._buffers
        if all(slot in own and own[slot].segment.name == handed.segment.name for slot, handed in kept.items()):
            return
        self._beside(lambda: self._adopt(kept, former))

    def _adopt(self, kept: Mapping[int, Handed], former: Collection[int]) -> None:
        if not _ended(former):
            log.info("A lost worker's process has not ended yet; its memory is not used again.")
            return
        for slot, handed in kept.items():
            own = self._buffers.get(slot)
            if own is None or own.segment.name != handed.segment.name:
                with contextlib.suppress(OSError):  # it is gone
                    adopted = SharedBuffer(handed.layout, self._device, handed.segment)
                    self._drop(slot)
                    self._buffers[slot] = adopted

    def close(self) -> None:
        """Give all of it back, as far as nobody else holds it."""
        self._await_thread()
        for slot in list(self._buffers):
            self._drop(slot)

    def _buffer(self, slot: int, sizes: Mapping[str, int]) -> SharedBuffer:
        if slot not in self._buffers or not self._buffers[slot].layout.fits(sizes):
            self._drop(slot)  # before there is another one
            self._buffers[slot] = SharedBuffer(lay_out(sizes), self._device)
        return self._buffers[slot]

    def _drop(self, slot: int) -> None:
        buffer = self._buffers.pop(slot, None)
        if buffer is not None:
            buffer.close()


def _sizes(pieces: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {key: math.prod(piece["data"].shape) * piece["data"].dtype.itemsize for key, piece in pieces.items()}


def _ended(pids: Collection[int]) -> bool:
    """Whether these processes are gone, or are soon."""
    deadline = time.monotonic() + ENDING
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True
