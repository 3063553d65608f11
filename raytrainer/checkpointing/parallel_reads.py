"""Parts of a checkpoint that are read several at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from raytrainer.signals import wait_until

__all__ = ["READERS", "read_all"]

#: How many are read at a time: one thread takes less than a disk gives, or the system's copy of it in memory.
READERS = 4

Key = TypeVar("Key")
Part = TypeVar("Part")


def read_all(reads: Mapping[Key, Callable[[], Part]]) -> dict[Key, Part]:
    """What each of these calls returns, in their order.

    Raises:
        Exception: That of the first one, in this order, that has failed. Those that have not begun are left out.
    """
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="raytrainer-read")
    try:
        parts = {key: pool.submit(read) for key, read in reads.items()}
        return {key: _result(part) for key, part in parts.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _result(part: Future[Part]) -> Part:
    wait_until(lambda seconds: bool(wait([part], seconds).done), math.inf)
    return part.result()
