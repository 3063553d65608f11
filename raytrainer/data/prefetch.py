"""Copying batches to a GPU while it computes.

The CPU issues work well ahead of the GPU, so a batch that is copied when the loop asks for it is copied while earlier
batches are being computed, if only the copy does not queue up behind them: hence a CUDA stream of its own. Nothing is
read ahead of the loop, so hooks run in their order, generators are drawn from in theirs, and a run resumes exactly.
From memory that is not pinned, a copy on the computing stream would even make the CPU wait for what is queued there.

A batch's memory belongs to the copying stream, which must not use it again before the computing one is through. torch's
answer, `record_stream`, has each later allocation ask the device whether it is, while the CPU is ahead: hundreds of
questions a step. So batches are held here until they have been used, which is asked once a batch; only those that
somebody else holds longer are recorded.
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
        # torch has few streams and gives them again: this one may have been another run's
        self.stream.wait_stream(cuda.current_stream(device))
        self._waiting: deque[tuple[Any, list[Tensor], int]] = deque()  # (when the batch has been used, it, its bytes)
        self._bytes = 0  # of them all
        self._last: tuple[list[Tensor], int] | None = None  # the batch in use, and its bytes

    def __call__(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        size = _copied_bytes(batch)
        if size is None or size < LEAST:
            return move(batch, device)
        current = self.cuda.current_stream(device)
        self._let_go(current)
        with self.cuda.stream(self.stream):
            moved = move(batch, device)
        current.wait_stream(self.stream)
        self._last = _aliases(moved), size
        return moved

    def _let_go(self, current: Any) -> None:
        """Free used batches; wait for the GPU, if it is so far behind that copied batches would fill its memory."""
        if self._last is not None:
            event = self.cuda.Event()
            event.record(current)  # all that uses the batch before this one is queued by now, if nobody keeps it
            self._waiting.append((event, *self._last))
            self._bytes += self._last[1]
            self._last = None
        while self._waiting:
            event, tensors, size = self._waiting[0]
            if not event.query():
                if self._bytes <= IN_FLIGHT or len(self._waiting) <= 2:
                    return
                event.synchronize()
            for tensor in tensors:
                if _holders(tensor) > _ALONE:
                    tensor.record_stream(current)
            self._waiting.popleft()
            self._bytes -= size


def _aliases(batch: Any) -> list[Tensor]:
    """For the memory of each tensor in `batch`, one tensor that nobody else has."""
    found: dict[int, Tensor] = {}

    def add(leaf: Any) -> Any:
        for tensor in _tensors(leaf) or []:
            found.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return leaf

    map_leaves(batch, add)
    return list(found.values())


def _holders(tensor: Tensor) -> int:
    """How many tensors, views, graphs and the like have this tensor's memory."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


#: Holders of memory that a single tensor has.
_ALONE = _holders(torch.empty(1))


def _tensors(leaf: Any) -> list[Tensor] | None:
    """Tensors in what `map_leaves` calls a leaf; None if something may be hidden in it."""
    if isinstance(leaf, Tensor):
        return [leaf] if type(leaf) is Tensor and leaf.layout is torch.strided else None
    if isinstance(leaf, Mapping):  # one that moves itself, such as transformers' BatchEncoding
        values = list(leaf.values())
        return values if all(type(value) is Tensor for value in values) else None
    return None if callable(getattr(leaf, "to", None)) else []


def _copied_bytes(batch: Any) -> int | None:
    """Bytes of a batch whose tensors are all known, and on the CPU; None for any other."""
    total: int | None = 0

    def add(leaf: Any) -> Any:
        nonlocal total
        tensors = _tensors(leaf)
        if tensors is None or any(tensor.device.type != "cpu" for tensor in tensors):
            total = None
        elif total is not None:
            total += sum(tensor.nbytes for tensor in tensors)
        return leaf

    if type(batch) is Tensor:
        return batch.nbytes if batch.device.type == "cpu" and batch.layout is torch.strided else None
    if type(batch) in (list, tuple) and all(type(item) is Tensor for item in batch):
        # what most loaders give, without rebuilding it
        on_cpu = all(item.device.type == "cpu" and item.layout is torch.strided for item in batch)
        return sum(item.nbytes for item in batch) if on_cpu else None
    map_leaves(batch, add)
    return total
