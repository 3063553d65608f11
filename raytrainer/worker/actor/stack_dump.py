"""A worker's process tells where its threads are when SIGUSR1 asks for it, also while one of them holds the GIL."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from pathlib import Path

from raytrainer.private.ray_private import log_folder

__all__ = ["ask", "can_be_asked"]

#: Seconds without a further line after which a dump is whole.
QUIET = 0.1


def can_be_asked() -> str | None:
    """Have this process write its threads' stacks to a file, whose path is returned, whenever it gets SIGUSR1.

    None where the system has no such signal, or somebody else has a use for it.
    """
    asked = getattr(signal, "SIGUSR1", None)
    if asked is None or signal.getsignal(asked) not in (signal.SIG_DFL, None):
        return None
    folder = log_folder() / "raytrainer"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stacks-{os.getpid()}.txt"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    faulthandler.register(asked, file=file, all_threads=True)  # written by C code, which needs no GIL
    return str(path)


def ask(pid: int, path: str, patience: float) -> str:
    """What the process writes now; "" where it writes nothing. Call it on the process's own machine."""
    file, deadline = Path(path), time.monotonic() + patience
    before = file.stat().st_size
    os.kill(pid, signal.SIGUSR1)
    seen, since = before, time.monotonic()
    while time.monotonic() < deadline and (seen == before or time.monotonic() - since < QUIET):
        size = file.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        time.sleep(0.01)
    with file.open() as stream:
        stream.seek(before)
        return stream.read()
