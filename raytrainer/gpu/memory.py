"""How much of a worker's own GPU is in use, and which GPU that is."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from raytrainer.gpu.choice import visible
from raytrainer.gpu.nvml import Nvml

__all__ = ["MemorySampler", "own_index"]


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
    uuids = nvml.uuids()
    with contextlib.suppress(Exception):
        import torch

        return uuids.index("GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-"))
    # without the device's own word: right if CUDA counts in PCI bus order
    shown = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
    ordinal = device.index or 0
    return shown[ordinal] if ordinal < len(shown) else None
