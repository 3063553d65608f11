"""Which batch this worker is in, for whoever looks at its process from beside it, also while it hangs."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

__all__ = ["NONE", "put_up_sign", "read_sign", "show_batch"]

#: It is in no batch of training.
NONE = -1

_sign = memoryview(bytearray(8)).cast("q")


def put_up_sign(path: Path) -> None:
    """From now on the number is in a file as well, which this process maps."""
    global _sign
    with contextlib.suppress(OSError):  # where there is no room, nobody can look
        path.write_bytes(NONE.to_bytes(8, "little", signed=True))
        file = os.open(path, os.O_RDWR)
        try:
            _sign = memoryview(mmap.mmap(file, 8)).cast("q")
        finally:
            os.close(file)


def show_batch(number: int) -> None:
    """This worker enters the epoch's batch of this number; `NONE`: it has left the last one."""
    _sign[0] = number


def read_sign(path: Path) -> int:
    """What another process shows there; `NONE` where it shows nothing."""
    try:
        return int.from_bytes(path.read_bytes()[:8], "little", signed=True)
    except OSError:
        return NONE
