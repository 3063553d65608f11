"""The one seam between driver and workers: a group obeys verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from raytrainer.gpu.choice import local_ordinal, use_pci_order
from raytrainer.gpu.nvml import open_nvml
from raytrainer.plan.settings import Settings
from raytrainer.task import Task
from raytrainer.worker.worker import Worker

__all__ = ["LocalGroup", "WorkerGroup", "local_group"]


class WorkerGroup(Protocol):
    """Workers that obey the verbs of `Worker`, all at once."""

    @property
    def size(self) -> int:
        """Number of workers."""

    @property
    def in_process(self) -> bool:
        """Whether the worker uses the driver's own objects, and lives and dies with it."""

    @property
    def broken(self) -> bool:
        """Whether it has been aborted."""

    @property
    def by_node(self) -> Mapping[str, int]:
        """Workers on each node of a cluster, by its id."""

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
    broken = False
    by_node: Mapping[str, int] = {}

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker or Worker()
        self._module: torch.nn.Module | None = None

    def describe(self) -> str:
        return f"this process ({self.worker.device})"

    def setup(self, task: Task) -> list[Any]:
        if self.worker.device.type == "cuda":
            torch.cuda.set_device(self.worker.device)
            _used.append(self.worker.device.index)
        self._module = task.module
        self.worker.prepare_data(task)
        return [self.worker.obey("setup", task)]

    def call(self, verb: str, *args: Any) -> list[Any]:
        if verb == "finish":
            report = self.worker.obey("finish_in_place", *args)
            self._bring_back()
            return [report]
        return [self.worker.obey(verb, *args)]

    def capture(self, weights_only: bool = False) -> Callable[[], list[dict[str, Any]]]:
        staged = self.worker.capture(weights_only)
        return lambda: [staged]

    def call_off(self) -> None:
        self.worker.abandon()
        self._bring_back()

    def abort(self) -> None:
        self.call_off()

    def _bring_back(self) -> None:
        """The run is over: the module is on the CPU, as after a run on other processes."""
        if self._module is not None and self.worker.device.type != "cpu":
            self._module.cpu()
        self._module = None

    def release(self) -> None:
        if self.worker.device.type == "cuda":
            self.worker.rest()


def local_group(settings: Settings) -> LocalGroup:
    """A group for strategy "local": on a GPU where the settings ask for one. CUDA starts with its first run.

    Raises:
        ConfigurationError: There is no such GPU.
        ResourceError: No GPU is free, for auto_select_gpus.
    """
    if not settings.on_gpu:
        return LocalGroup()
    own: list[int] = []  # what this process uses already, latest first
    if torch.cuda.is_initialized():
        own = _used[::-1] + [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(i)]
    else:
        use_pci_order()
    ordinal = local_ordinal(settings.gpus, settings.auto_select_gpus, open_nvml(), own)
    return LocalGroup(Worker(device=torch.device("cuda", ordinal)))


_used: list[int] = []  # the GPUs of runs in this process
