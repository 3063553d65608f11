"""Where a worker's prints go: to the driver, with the worker's rank; or to a file beside Ray's own logs.

Ray shows the driver what its workers write, each line after the name that the actor gave itself. Lines of a file that
Ray does not know stay on their node.
"""

from __future__ import annotations

import os
import sys

from raytrainer.private.ray_private import log_folder

__all__ = ["Output"]


class Output:
    """The standard output and error of this process; they begin as Ray has set them up."""

    def __init__(self) -> None:
        self._shown = [os.dup(descriptor) for descriptor in (1, 2)]
        self.path: str | None = None

    def announce(self, rank: int) -> None:
        """Have Ray put "rank N" before this worker's lines from now on."""
        self.show()
        for stream in (sys.stdout, sys.stderr):
            print(f":actor_name:rank {rank}", file=stream, flush=True)

    def keep(self, rank: int) -> str:
        """Send everything that follows, native libraries' output too, to a file; return its path."""
        folder = log_folder() / "raytrainer"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = str(folder / f"rank{rank}-{os.getpid()}.log")
        self._flush()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.close(file)
        return self.path

    def show(self) -> None:
        """Undo `keep`."""
        self._flush()
        for descriptor, shown in zip((1, 2), self._shown, strict=True):
            os.dup2(shown, descriptor)
        self.path = None

    @staticmethod
    def _flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
