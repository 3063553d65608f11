"""A CUDA that keeps account of the main memory that it is told of."""

from __future__ import annotations

from typing import Any

import torch
from gpu.harness import is_mapped


class Cuda:
    """The memory that it has been told of: begin and size."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.refuses = False
        self.there: list[bool] = []  # whether memory was still this process's when CUDA was told to forget it

    def register(self, address: int, size: int, device: Any) -> bool:
        if not self.refuses:
            self.known[address] = size
        return not self.refuses

    def unregister(self, address: int, device: Any) -> bool:
        del self.known[address]
        self.there.append(is_mapped(address))
        return True

    def knows(self, tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= begin and end <= start + size for start, size in self.known.items())
