"""`WayHome`: tensors of a GPU go to main memory beside its work, from copies that it makes of them first.

The way to main memory takes twenty times as long as a copy within the GPU (400 MB: 8 ms and 0.3), so training waits for
the latter only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raytrainer.private.torch_private import copy_together

__all__ = ["WayHome"]

#: Of the memory that a GPU has free, copies may take one part in so many: what training takes meanwhile is to fit too.
PARTS = 4


class WayHome:
    """A stream of one GPU, beside all that it does.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def send(self, tensors: Sequence[Tensor], places: Sequence[Tensor]) -> Callable[[], None] | None:
        """Have them copied, as they are when the GPU has done what it has been told so far.

        Args:
            tensors: On this GPU.
            places: Where they go: alike, contiguous, in pinned memory.

        Returns:
            Waits until all are there, in any thread. None: the GPU has no room for copies, and nothing has been done.
        """
        with torch.cuda.device(self._device), torch.no_grad():
            if PARTS * sum(place.nbytes for place in places) > torch.cuda.mem_get_info()[0]:
                return None
            try:
                copies = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
            except torch.cuda.OutOfMemoryError:
                return None
            copy_together(copies, [tensor.detach() for tensor in tensors])
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for copy, place in zip(copies, places, strict=True):
                    place.copy_(copy, non_blocking=True)
                    copy.record_stream(self._stream)  # its memory is free when that is done
                there = torch.cuda.Event(blocking=True)
                there.record()
        return there.synchronize
