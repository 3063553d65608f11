"""What every profiler offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from raytrainer.short_repr import ShortRepr

if TYPE_CHECKING:
    import torch

__all__ = ["Profiler"]


class Profiler(ShortRepr, ABC):
    """Watches one worker's hooks. It is sent to the workers, and each has its own; reports come home as files.

    Besides the module's and worker callbacks' hooks, it is shown "next_batch" (waiting for the loader), "backward",
    "optimizer_step" and "transfer_batch_to_device".

    Attributes:
        suffix: Of the files with reports.
        summary: Whether rank 0's report is logged, being text for people.
        files: Paths of the last run's reports by rank, on the driver.
    """

    suffix: ClassVar[str] = "txt"
    summary: ClassVar[bool] = True
    files: list[str]

    def __init__(self) -> None:
        self.files = []

    @abstractmethod
    def start(self, rank: int, device: torch.device) -> None:
        """A run begins in this worker; forget earlier ones."""

    @abstractmethod
    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, watched under `name`. Asked once for each hook."""

    def step(self) -> None:
        """A batch is done: in `fit` a training batch."""
        return None

    @abstractmethod
    def stop(self) -> bytes | None:
        """The run ends: the content of this worker's file; None: nothing was recorded. May be called twice."""
