"""Copying batches to a GPU while it computes.

The CPU issues work well ahead of the GPU, so a batch that is copied when the loop asks for it is copied while earlier
batches are being computed, if only the copy does not queue up behind them: hence a CUDA stream of its own. Nothing is
read ahead of the loop, so hooks run in their order, generators are drawn from in theirs, and a run resumes exactly.
From memory that is not pinned, a copy on the computing stream would even make the CPU wait for what is queued there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raytrainer.data.transfer import map_leaves, move

__all__ = ["CopyStream"]

#: Bytes of a batch from which the stream pays: smaller copies are done before the stream is switched.
LEAST = 64 * 1024

#: The same for pinned memory, from which a copy never makes the CPU wait. It takes a GPU 40 us or less, and the stream
#: the CPU more than that: besides switching, torch's allocator asks for recorded memory with each allocation.
LEAST_PINNED = 2**20

#: Bytes of copied batches that may wait for the GPU, besides two, before the CPU waits: memory that is not free again.
IN_FLIGHT = 256 * 2**20


class CopyStream:
    """Stands for `transfer_batch_to_device` where nobody overrides it.

    Args:
        device: The GPU.
        cuda: `torch.cuda`, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.stream = cuda.Stream(device)
        self._waiting: deque[tuple[Any, int]] = deque()  # (when the batch has been used, its bytes)
        self._bytes = 0  # of them all
        self._last = 0  # bytes of the batch in use

    def __call__(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        tensors = _to_copy(batch)
        size = sum(tensor.nbytes for tensor in tensors)
        if size < LEAST or (size < LEAST_PINNED and all(tensor.is_pinned() for tensor in tensors)):
            return move(batch, device)
        current = self.cuda.current_stream(device)
        self._limit(current)
        self._last = size
        with self.cuda.stream(self.stream):
            moved = move(batch, device)
        current.wait_stream(self.stream)
        # the memory belongs to the copying stream, which must not use it again before the computing one is through
        map_leaves(moved, lambda leaf: _record(leaf, current))
        return moved

    def _limit(self, current: Any) -> None:
        """Wait for the GPU, if it is so far behind that copied batches would fill its memory."""
        if self._last:
            event = self.cuda.Event()
            event.record(current)  # all that uses the batch before this one is queued by now
            self._waiting.append((event, self._last))
            self._bytes += self._last
        while self._waiting:
            event, size = self._waiting[0]
            if not event.query():
                if self._bytes <= IN_FLIGHT or len(self._waiting) <= 2:
                    return
                event.synchronize()
            self._waiting.popleft()
            self._bytes -= size


def _record(leaf: Any, stream: Any) -> Any:
    for tensor in _tensors(leaf) or []:
        tensor.record_stream(stream)
    return leaf


def _tensors(leaf: Any) -> list[Tensor] | None:
    """Tensors in what `map_leaves` calls a leaf; None if something may be hidden in it."""
    if isinstance(leaf, Tensor):
        return [leaf] if type(leaf) is Tensor and leaf.layout is torch.strided else None
    if isinstance(leaf, Mapping):  # one that moves itself, such as transformers' BatchEncoding
        values = list(leaf.values())
        return values if all(type(value) is Tensor for value in values) else None
    return None if callable(getattr(leaf, "to", None)) else []


def _to_copy(batch: Any) -> list[Tensor]:
    """The tensors of a batch, if all are known and on the CPU; none of any other."""
    found: list[Tensor] = []
    hidden = False

    def add(leaf: Any) -> Any:
        nonlocal hidden
        tensors = _tensors(leaf)
        hidden = hidden or tensors is None
        found.extend(tensors or [])
        return leaf  # containers are rebuilt, and may check what they hold

    if type(batch) in (list, tuple) and all(type(item) is Tensor for item in batch):
        for item in batch:  # what most loaders give, without rebuilding it
            add(item)
    else:
        map_leaves(batch, add)
    return [] if hidden or any(tensor.device.type != "cpu" for tensor in found) else found
