"""Numbers on their way from the device, together and without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raytrainer.metric_messages import Number

__all__ = ["begin_fetch"]


def begin_fetch(values: Sequence[Any]) -> Callable[[], list[Number]]:
    """Have numbers and scalar tensors fetched; what this returns waits for that, and gives them in order, unrounded.

    Whole numbers stay ints.

    Tensors of one device and type travel together, and a GPU's beside what it is given to do later.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append(index)
    travelling = [
        (indices, *_to_host(torch.stack([values[i] for i in indices]), device))
        for (device, _), indices in groups.items()
    ]

    def fetched() -> list[Number]:
        plain = list(values)
        for indices, arrived, numbers in travelling:
            if arrived is not None:
                arrived.synchronize()
            for index, number in zip(indices, numbers.tolist(), strict=True):
                plain[index] = number
        return [int(value) if isinstance(value, int) else float(value) for value in plain]

    return fetched


def _to_host(tensor: Tensor, device: torch.device) -> tuple[torch.cuda.Event | None, Tensor]:
    """A tensor that will be in main memory once the event, if there is one, has come."""
    if device.type != "cuda":
        return None, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return arrived, host
