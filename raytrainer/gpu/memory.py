"""How much of a worker's own GPU is in use, and which GPU that is."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from raytrainer.gpu.choice import visible
from raytrainer.gpu.nvml import Nvml, open_nvml

__all__ = ["MemorySampler", "own_index", "samplers"]

log = logging.getLogger("raytrainer")


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


def samplers(mode: str, device: Any, node: int) -> list[MemorySampler]:
    """What measures on logging steps for `log_gpu_memory=mode`; nothing where NVML knows no GPU of this process."""
    nvml = open_nvml() if device.type == "cuda" else None
    index = None if nvml is None else own_index(device, nvml)
    if nvml is None or index is None:
        log.warning("log_gpu_memory=%r: NVML knows no GPU of this worker (%s).", mode, device)
        return []
    return [MemorySampler(mode, nvml, index, node)]


def own_index(device: Any, nvml: Nvml) -> int | None:
    """PCI index of a torch device of this process; None where it cannot be told. Call it where CUDA runs anyway."""
    uuids = nvml.uuids()
    with contextlib.suppress(Exception):
        import torch

        return uuids.index("GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-"))
    # without the device's own word: right if CUDA counts in PCI bus order
    shown = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    ordinal = device.index or 0
    return shown[ordinal] if ordinal < len(shown) else None
