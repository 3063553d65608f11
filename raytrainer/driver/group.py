"""The one seam between driver and workers: a group obeys verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from raytrainer.messages import Task
from raytrainer.worker.worker import Worker

__all__ = ["LocalGroup", "WorkerGroup"]


class WorkerGroup(Protocol):
    """Workers that obey the verbs of `Worker`, all at once."""

    @property
    def size(self) -> int:
        """Number of workers."""

    @property
    def in_process(self) -> bool:
        """Whether the worker uses the driver's own objects, and lives and dies with it."""

    def describe(self) -> str:
        """Where the workers are, in a few words."""

    def setup(self, task: Task) -> list[Any]:
        """`prepare_data` once a node, then `setup` on every worker; its reports, by rank."""

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Every worker obeys `verb`; the answers, by rank.

        Raises:
            Exception: What user code raised in a worker; its `__cause__` is a `WorkerError` saying where.
            WorkerLostError: A worker is gone.
        """

    def capture(self, weights_only: bool = False) -> Callable[[], list[dict[str, Any]]]:
        """Have every worker copy its state aside; return what fetches the copies, by rank, at any later time."""

    def call_off(self) -> None:
        """The run has failed with an error that is being told: end it, keeping workers that are well."""

    def abort(self) -> None:
        """End whatever runs, at once; the group cannot be used any more."""

    def release(self) -> None:
        """The run is over; keep the group for the next one, or not."""


class LocalGroup:
    """One worker, in the driver's process: breakpoints, profilers and tracebacks just work."""

    size = 1
    in_process = True

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker or Worker()

    def describe(self) -> str:
        return f"this process ({self.worker.device})"

    def setup(self, task: Task) -> list[Any]:
        self.worker.prepare_data(task)
        return [self.worker.setup(task)]

    def call(self, verb: str, *args: Any) -> list[Any]:
        if verb == "finish":
            verb = "finish_in_place"
        return [getattr(self.worker, verb)(*args)]

    def capture(self, weights_only: bool = False) -> Callable[[], list[dict[str, Any]]]:
        self.worker.capture(weights_only)
        staged = self.worker.take_staged()
        return lambda: [staged]

    def call_off(self) -> None:
        self.worker.abandon()

    def abort(self) -> None:
        self.worker.abandon()

    def release(self) -> None:
        pass
