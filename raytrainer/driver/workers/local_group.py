"""`LocalGroup`: one worker, in the driver's own process."""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
from collections.abc import Callable, Collection, Mapping
from typing import Concatenate, ParamSpec, TypeVar

import torch

from raytrainer.driver.workers.worker_group import Copies, Room
from raytrainer.gpu.choice import local_ordinal, require_cuda, use_pci_order
from raytrainer.gpu.nvml import open_nvml
from raytrainer.messages import SetupReport
from raytrainer.plan.recoveries import Continuity
from raytrainer.plan.settings import Settings
from raytrainer.plan.where_it_is import Silence, Whereabouts, whereabouts
from raytrainer.task import Task
from raytrainer.worker.staging import arrived
from raytrainer.worker.worker import Worker

__all__ = ["LocalGroup", "local_group"]

P = ParamSpec("P")
R = TypeVar("R")


class LocalGroup:
    """One worker, in the driver's process: breakpoints, profilers and tracebacks just work."""

    size = 1
    in_process = True
    broken = False
    continuity = Continuity()
    by_node: Mapping[str, int] = {}

    def __init__(self, worker: Worker | None = None) -> None:
        self.worker = worker or Worker(in_place=True)
        self._module: torch.nn.Module | None = None
        self._silence = Silence()

    def describe(self) -> str:
        return f"this process ({self.worker.device})"

    def setup(self, task: Task) -> list[SetupReport]:
        if self.worker.device.type == "cuda":
            torch.cuda.set_device(self.worker.device)
            _used.append(self.worker.device.index)
        self._module = task.module
        self.worker.prepare_data(task)
        return [self.worker.obey(Worker.setup, task)]

    def call(self, method: Callable[Concatenate[Worker, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        with self._silence:
            answer = self.worker.obey(method, *args, **kwargs)
        if method.__name__ == "finish":
            self._bring_back()
        return [answer]

    def later(self, method: Callable[Concatenate[Worker, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.call(method, *args, **kwargs)

    def whereabouts(self, patience: float) -> list[Whereabouts]:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            node, seconds = f"{socket.gethostname()}, pid {os.getpid()}", self._silence.seconds
            return [whereabouts(0, node, file.read(), seconds)]

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        staged = self.worker.capture(weights_only, live=final, final=final)
        return Copies(lambda: ([arrived(staged)], None))

    def room(self, weights_only: bool) -> Room:
        return Room()

    def call_off(self) -> None:
        try:
            self.worker.abandon()
        finally:
            self._bring_back()

    def abort(self) -> None:
        self.call_off()

    def mended(self) -> None:
        return None

    def recorded(self, chunks: Collection[int]) -> None:
        return None

    def keep_spares(self, count: int) -> None:
        pass

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
    require_cuda()
    return LocalGroup(Worker(device=torch.device("cuda", ordinal), in_place=True))


_used: list[int] = []  # the GPUs of runs in this process
