"""Which GPUs Ray has given to this worker's process."""

from __future__ import annotations

import ray

from raytrainer.errors import ResourceError
from raytrainer.gpu.nvml import open_nvml

__all__ = ["own_gpu_indices"]


def own_gpu_indices() -> list[int]:
    """PCI indices of the GPUs that Ray has given to this worker process."""
    given = [str(value) for value in ray.get_gpu_ids()]
    if all(value.isdigit() for value in given):
        return [int(value) for value in given]
    nvml = open_nvml()
    uuids = [] if nvml is None else nvml.uuids()
    named = [[i for i, uuid in enumerate(uuids) if uuid.startswith(value)] for value in given]
    if not all(named):
        raise ResourceError(f"Ray gave the GPUs {given}, which NVML does not know (it has {uuids}).")
    return [indices[0] for indices in named]
