"""What NVML says about this machine's GPUs. `Nvml` takes the pynvml module, or a fake of it, as its one seam."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["Card", "MemorySampler", "Nvml", "open_nvml", "own_index"]

log = logging.getLogger("raytrainer")

_MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A GPU at one moment.

    Attributes:
        index: Its place in PCI bus order, as `nvidia-smi` counts.
        uuid: "GPU-..." as in CUDA_VISIBLE_DEVICES.
        name: E.g. "NVIDIA H100 80GB HBM3".
        used: MiB in use, without what the driver itself reserves (where NVML can tell).
        total: MiB.
        processes: Processes that hold memory on it and can be seen from here.
    """

    index: int
    uuid: str
    name: str
    used: float
    total: float
    processes: int = 0


class Nvml:
    """This machine's GPUs in PCI bus order.

    Args:
        library: What has pynvml's functions.

    Raises:
        Exception: pynvml's NVMLError where there is no driver.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        library.nvmlInit()
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        # NVML promises no order
        self.handles: list[Any] = sorted(handles, key=lambda handle: _text(library.nvmlDeviceGetPciInfo(handle).busId))

    def __len__(self) -> int:
        return len(self.handles)

    def cards(self) -> list[Card]:
        """All GPUs, as they are now."""
        return [self._card(index, handle) for index, handle in enumerate(self.handles)]

    def uuids(self) -> list[str]:
        """Of all GPUs, in PCI bus order."""
        return [_text(self.library.nvmlDeviceGetUUID(handle)) for handle in self.handles]

    def used(self, index: int) -> float:
        """MiB in use on one GPU."""
        return float(self._memory(self.handles[index]).used) / _MIB

    def utilisation(self, index: int) -> float | None:
        """Percent of the last moments in which a kernel ran; None where the GPU does not tell."""
        with contextlib.suppress(Exception):
            return float(self.library.nvmlDeviceGetUtilizationRates(self.handles[index]).gpu)
        return None

    def _card(self, index: int, handle: Any) -> Card:
        memory, processes = self._memory(handle), set[int]()  # one may compute and draw
        for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            # containers and old drivers may refuse
            with contextlib.suppress(Exception):
                processes |= {process.pid for process in getattr(self.library, name)(handle)}
        uuid, name = (_text(get(handle)) for get in (self.library.nvmlDeviceGetUUID, self.library.nvmlDeviceGetName))
        return Card(index, uuid, name, memory.used / _MIB, memory.total / _MIB, len(processes))

    def _memory(self, handle: Any) -> Any:
        version = getattr(self.library, "nvmlMemory_v2", None)
        if version is not None:
            # the first version counts what the driver reserves as used
            with contextlib.suppress(Exception):
                return self.library.nvmlDeviceGetMemoryInfo(handle, version=version)
        return self.library.nvmlDeviceGetMemoryInfo(handle)


@functools.cache
def open_nvml() -> Nvml | None:
    """NVML of this process; None where there is no NVIDIA driver. Opened once."""
    try:
        import pynvml

        return Nvml(pynvml)
    except Exception as error:
        log.debug("no NVML: %s", error)
        return None


class MemorySampler:
    """Memory in use on a worker's own GPU, as values for the loggers, in MiB.

    Args:
        mode: "all": a name for each GPU, "gpu_memory/node0-gpu1"; "min_max": "gpu_memory/min" and "gpu_memory/max",
            of which the driver takes the least and the greatest over all workers.
        nvml: This machine's GPUs.
        index: The worker's own.
        node: Index of its node in the run.
    """

    def __init__(self, mode: str, nvml: Nvml, index: int, node: int) -> None:
        self.nvml, self.index = nvml, index
        names = [f"node{node}-gpu{index}"] if mode == "all" else ["min", "max"]
        self.names = [f"gpu_memory/{name}" for name in names]

    def __call__(self) -> dict[str, float]:
        return dict.fromkeys(self.names, self.nvml.used(self.index))


def own_index(device: Any, nvml: Nvml) -> int | None:
    """PCI index of a torch device of this process; None where it cannot be told. Call it where CUDA runs anyway."""
    from raytrainer.gpu.select import visible

    uuids = nvml.uuids()
    with contextlib.suppress(Exception):
        import torch

        return uuids.index("GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-"))
    # without the device's own word: right if CUDA counts in PCI bus order
    shown = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    ordinal = device.index or 0
    return shown[ordinal] if ordinal < len(shown) else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
