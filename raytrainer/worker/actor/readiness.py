"""What a spare worker does before it is needed: it imports what the run's workers have imported."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raytrainer.worker.actor.module_pickling import adopt

__all__ = ["Readiness", "get_ready"]


@dataclass(frozen=True)
class Readiness:
    """What a spare has cost.

    Attributes:
        seconds: Of computing.
        megabytes: Of memory that the process takes, shared pages of libraries included; None: the system does not tell.
    """

    seconds: float
    megabytes: float | None

    def __str__(self) -> str:
        memory = "" if self.megabytes is None else f" and {self.megabytes:.0f} MB of memory"
        return f"{self.seconds:.1f} s of computing{memory}"


def get_ready(names: Sequence[str], surroundings: bytes) -> Readiness:
    """Import modules of these names, as far as that works, in the pickled `Surroundings` of the run's workers."""
    adopt(pickle.loads(surroundings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # workers have told them
        for name in names:
            if not name.startswith("__"):
                with contextlib.suppress(BaseException):  # some names are given to modules that are found otherwise
                    importlib.import_module(name)
    return Readiness(time.process_time(), _resident())


def _resident() -> float | None:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return None
