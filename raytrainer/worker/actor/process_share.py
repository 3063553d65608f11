"""What Ray has given to a worker's process, and how a spare takes it over when that process is gone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from raytrainer.errors import ResourceError
from raytrainer.gpu.choice import describe_loads, is_free
from raytrainer.gpu.nvml import open_nvml
from raytrainer.worker.actor.own_gpus import own_gpu_indices

__all__ = ["ProcessShare"]

#: Variables that Ray sets for each process of its own, or that a spare waits with.
_OWN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK")

#: Seconds for a killed process to end, and then for its GPU's memory to be free. Each takes well under one.
ENDING, FREEING = 10.0, 5.0

#: Seconds between looks.
LOOK_EVERY = 0.02


@dataclass(frozen=True)
class ProcessShare:
    """A process's part of its machine.

    Attributes:
        gpus: PCI indices of its GPUs.
        ids: What Ray calls them.
        threads: How many torch computes with.
        environment: Variables that differ from process to process; None: not set.
    """

    gpus: list[int]
    ids: list[str]
    threads: int
    environment: dict[str, str | None]

    @classmethod
    def of_this_process(cls, on_gpu: bool) -> ProcessShare:
        """What Ray has given to this one."""
        gpus, ids = (own_gpu_indices(), [str(value) for value in ray.get_gpu_ids()]) if on_gpu else ([], [])
        return cls(gpus, ids, torch.get_num_threads(), {name: os.environ.get(name) for name in _OWN_VARIABLES})

    def take_over(self, pid: int) -> None:
        """Make it this process's, once the process `pid` of this machine, which had it, is gone.

        Raises:
            ResourceError: That process does not end, or its GPU's memory stays taken.
        """
        _await(lambda: _ended(pid), ENDING, f"the process {pid}, which is to be replaced, does not end")
        nvml = open_nvml() if self.gpus else None
        if nvml is not None:
            cards = nvml.cards
            _await(
                lambda: all(is_free(card) for card in cards() if card.index in self.gpus),
                FREEING,
                lambda: f"the GPU of a lost worker stays in use: {describe_loads(cards())}",
            )
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


def _await(condition, seconds, otherwise) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ResourceError(otherwise if isinstance(otherwise, str) else otherwise())
        time.sleep(LOOK_EVERY)


def _ended(pid: int) -> bool:
    """Whether a process is gone with all that it held: a zombie holds nothing."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True  # or the system has no such files
    return state in "ZX"
