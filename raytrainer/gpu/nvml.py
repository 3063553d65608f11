"""What NVML says about this machine's GPUs. `Nvml` takes the pynvml module, or a fake of it, as its one seam."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass
from typing import Any

__all__ = ["Card", "Nvml", "open_nvml"]

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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
