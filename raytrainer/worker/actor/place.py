"""Where a worker's process is, as the driver is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import ray
import torch

from raytrainer.version import __version__
from raytrainer.worker.actor.process_share import ProcessShare

__all__ = ["Place", "own_versions"]


@dataclass(frozen=True)
class Place:
    """Where a worker is: its node's id, address and host name; PCI indices of its GPUs; versions of what runs there.

    `stacks` is the file on its node that its process `pid` writes its threads' stacks to when it is asked; `share` is
    what Ray has given to the process.
    """

    node_id: str
    address: str
    host: str
    gpus: list[int]
    versions: dict[str, str]
    pid: int
    stacks: str | None
    share: ProcessShare


def own_versions() -> dict[str, str]:
    """Versions of what driver and workers must share."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"Python": python, "Ray": ray.__version__, "raytrainer": __version__, "torch": torch.__version__}
