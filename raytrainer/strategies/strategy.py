"""The worker's side of a strategy. Loops call it and never ask how many workers there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.data.sharding import Share
from raytrainer.plan.ranks import Ranks

__all__ = ["NOTHING", "Strategy"]

#: What a worker whose slice of a batch is empty has to gather.
NOTHING: Any = object()


class Strategy(ABC):
    """One worker's part in a group. Concrete strategies are final."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device

    @property
    @abstractmethod
    def share(self) -> Share:
        """Which part of every loader this worker gets."""

    @property
    def split(self) -> Share:
        """Which slice of every batch that is read this worker takes; the whole, but where a node's workers split it."""
        return Share(0, 1)

    def gather(self, output: Any) -> list[Any]:
        """Outputs of the workers that split a batch, by rank, without those that had `NOTHING`. Differentiable."""
        return [output]

    @abstractmethod
    def prepare(self, module: nn.Module, step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
        """Ready the module for training; return the training step to call, forward synchronisation included."""

    @abstractmethod
    def sync_next(self, sync: bool) -> None:
        """Whether the next backward pass synchronises gradients; False on accumulating batches."""

    @abstractmethod
    def sync_manual(self, module: nn.Module) -> None:
        """Synchronise the gradients that a manual backward pass has left."""

    @abstractmethod
    def sync_buffers(self, module: nn.Module) -> None:
        """Give every worker the buffers of rank 0 (running statistics), so that all evaluate one and the same model."""

    @abstractmethod
    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is true on every worker."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Tensors of all workers, stacked in a new first dimension."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any] | None:
        """On rank 0 every worker's `value`, by rank; None on others. It is pickled, and should be in main memory."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all workers are here."""
