"""`Surroundings`: what a worker's process takes over of the driver's, besides the task itself.

The table in examples/guide/running.md says what does and what does not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Surroundings", "merged_path"]

log = logging.getLogger("raytrainer")


@dataclass(frozen=True)
class Surroundings:
    """Settings of a process.

    Attributes:
        path: Folders that modules are imported from.
        folder: The working directory.
        dtype: Torch's default.
        matmul_precision: Torch's, of float32.
        levels: Of loggers that have one of their own, by name, but for Ray's.
        environment: Variables that were set (or, None: removed) after Ray had started on this machine.
    """

    path: list[str]
    folder: str
    dtype: torch.dtype
    matmul_precision: str
    levels: dict[str, int]
    environment: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str | None] | None = None) -> Surroundings:
        """Those of the process that this is called in."""
        loggers = {
            name: found for name, found in logging.root.manager.loggerDict.items() if not name.startswith("ray.")
        }
        levels = {name: found.level for name, found in loggers.items() if isinstance(found, logging.Logger)}
        try:
            folder = os.getcwd()
        except OSError:  # it has been deleted
            folder = ""
        return cls(
            path=[
                os.path.normpath(os.path.join(folder, entry))
                for entry in sys.path
                if isinstance(entry, str) and (folder or os.path.isabs(entry))
            ],
            folder=folder,
            dtype=torch.get_default_dtype(),
            matmul_precision=torch.get_float32_matmul_precision(),
            levels={name: level for name, level in levels.items() if level and name.partition(".")[0] != "ray"},
            environment=dict(environment or {}),
        )

    def adopt(self, previous: Surroundings | None, keep_folder: bool) -> None:
        """Make them those of this process.

        Args:
            previous: The ones adopted last, whose environment variables and levels go.
            keep_folder: Whether the working directory is a copy of the driver's.
        """
        if previous is not None:
            for name in previous.environment.keys() - self.environment.keys():
                os.environ.pop(name, None)
            for name in previous.levels.keys() - self.levels.keys():
                logging.getLogger(name).setLevel(logging.NOTSET)
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        sys.path[:] = merged_path(sys.path, [entry for entry in self.path if os.path.exists(entry)])
        if not keep_folder and self.folder:
            with contextlib.suppress(OSError):  # another machine need not have it
                os.chdir(self.folder)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.matmul_precision)
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)


def merged_path(own: list[str], theirs: list[str]) -> list[str]:
    """Our own entries in their order, and theirs that we lack before the entries that they precede there."""
    merged, known = list(own), {os.path.abspath(entry) for entry in own}
    place = len(merged)
    for entry in reversed(theirs):
        if entry in known:
            found = [i for i, other in enumerate(merged) if os.path.abspath(other) == entry]
            place = min(place, found[0])
        else:
            merged.insert(place, entry)
            known.add(entry)
    return merged
