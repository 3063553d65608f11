"""Copies of a state in buffers that are used again: training waits for one copy, and for no allocation."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Staged", "Staging"]


class Staged(dict[str, Any]):
    """A copied state. Its buffers are used for a later copy when nobody holds it any more."""


class Staging:
    """Hands out copies; keeps as many sets of buffers as there are copies alive at once."""

    def __init__(self) -> None:
        self._free: list[dict[str, Tensor]] = []
        self._lock = threading.Lock()

    def copy(self, state: Mapping[str, Any]) -> Staged:
        """`state` with every tensor in it copied to main memory (pinned, if it comes from a GPU), and all else too."""
        with self._lock:
            buffers = self._free.pop() if self._free else {}
        used: dict[str, Tensor] = {}
        on_gpu = False

        def walk(value: Any, path: str) -> Any:
            nonlocal on_gpu
            if isinstance(value, Tensor):
                on_gpu |= value.device.type != "cpu"
                used[path] = buffer = _fitting(buffers.get(path), value)
                # leaf tensors may require gradients; the copy never does
                buffer.copy_(value.detach(), non_blocking=True)
                return buffer
            if isinstance(value, Mapping):
                return {key: walk(item, f"{path}/{key!r}") for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                items = [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
                return items if isinstance(value, list) else tuple(items)
            return _copied(value)

        with torch.no_grad():
            staged = Staged({name: walk(value, name) for name, value in state.items()})
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        weakref.finalize(staged, self._give_back, used)
        return staged

    def _give_back(self, buffers: dict[str, Tensor]) -> None:
        with self._lock:
            self._free.append(buffers)
            del self._free[:-2]


def _copied(value: Any) -> Any:
    """What training may change while it is written: arrays, queues, objects of users."""
    try:
        return copy.deepcopy(value)
    except Exception:  # whether it can be pickled is for others to find out
        return value


def _fitting(buffer: Tensor | None, value: Tensor) -> Tensor:
    if buffer is not None and buffer.dtype == value.dtype and buffer.shape == value.shape:
        return buffer
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
