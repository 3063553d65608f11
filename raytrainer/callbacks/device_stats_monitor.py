"""Log what each worker's device and process are doing."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raytrainer.callbacks._without_logger import warn_without_logger
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError
from raytrainer.gpu.memory import own_index
from raytrainer.gpu.nvml import open_nvml

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["DeviceStatsMonitor"]

_MIB = 2**20
_SIZES = {"allocated": "allocated_bytes.all.current", "reserved": "reserved_bytes.all.current",
          "peak_allocated": "allocated_bytes.all.peak"}  # fmt: skip


class DeviceStatsMonitor(WorkerCallback):
    """On logging steps of training, gives the loggers a series of each worker, `device_stats/rank0/...`.

    Of a GPU: `allocated_mib`, `reserved_mib` and `peak_allocated_mib` of torch's allocator, its `alloc_retries` (times
    that it had to free its cache to go on), and `utilisation_percent` by NVML where it tells. Of the worker's process:
    `cpu_percent` (of one core, since the last logging step) and `rss_mib`; of its machine, where psutil is installed:
    `machine_cpu_percent` and `machine_memory_percent`.

    Args:
        cpu_stats: Whether to log what is said of the process and its machine; None: on CPU workers only.

    Raises:
        ConfigurationError: `cpu_stats` is something else.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        if cpu_stats not in (None, True, False):
            raise ConfigurationError(f"DeviceStatsMonitor(cpu_stats={cpu_stats!r}): give True, False or None.")
        self.cpu_stats = cpu_stats
        self._device = torch.device("cpu")
        self._index: int | None = None  # of the GPU, in PCI order
        self._prefix = ""
        self._clocks = (0.0, 0.0)

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Say so if there is no logger."""
        warn_without_logger("DeviceStatsMonitor", trainer, "nobody sees its values")

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        """Have the worker measured on logging steps."""
        self._device, self._prefix = module.device, f"device_stats/rank{trainer.global_rank}"
        nvml = open_nvml() if self._device.type == "cuda" else None
        self._index = None if nvml is None else own_index(self._device, nvml)
        self._clocks = time.perf_counter(), time.process_time()
        trainer.samplers.append(self._sample)

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            values |= self._gpu()
        if self.cpu_stats or (self.cpu_stats is None and not on_gpu):
            values |= self._cpu()
        return {f"{self._prefix}/{name}": value for name, value in values.items()}

    def _gpu(self) -> dict[str, float]:
        stats: dict[str, Any] = torch.cuda.memory_stats(self._device)
        values = {f"{name}_mib": stats.get(key, 0) / _MIB for name, key in _SIZES.items()}
        values["alloc_retries"] = float(stats.get("num_alloc_retries", 0))
        nvml = open_nvml()
        busy = None if nvml is None or self._index is None else nvml.utilisation(self._index)
        if busy is not None:
            values["utilisation_percent"] = busy
        return values

    def _cpu(self) -> dict[str, float]:
        wall, used = time.perf_counter(), time.process_time()
        before_wall, before_used = self._clocks
        self._clocks = wall, used
        values = {"cpu_percent": 100 * (used - before_used) / max(wall - before_wall, 1e-9), "rss_mib": _rss() / _MIB}
        try:
            psutil = importlib.import_module("psutil")
        except ImportError:
            return values
        values["machine_cpu_percent"] = float(psutil.cpu_percent())
        values["machine_memory_percent"] = float(psutil.virtual_memory().percent)
        return values


def _rss() -> int:
    """Bytes of main memory that this process uses; at its peak, where the system tells no more."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except ImportError:  # Windows
        return 0
    except OSError:
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
