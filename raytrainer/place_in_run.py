"""Where in a run this process is: `rank()`, `world_size()` and `data_part()`, for code that has no `self.trainer`.

They work wherever user code runs: in workers, in processes of their loaders however these were started, in a run in
the driver's process, and outside of any run, where there is one process. On the driver of a run over workers the same
holds: what is to be each worker's own is asked for in the worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from raytrainer.plan.ranks import Ranks

__all__ = ["PlaceInRun", "advise", "data_part", "rank", "take_place", "world_size"]

#: How processes that a worker starts anew know of it.
_VARIABLE = "RAYTRAINER_PLACE"


class PlaceInRun(NamedTuple):
    """A worker's rank, and which part of the data it reads: not the same where several workers read alike."""

    rank: int = 0
    world_size: int = 1
    part: int = 0
    parts: int = 1


_place: PlaceInRun | None = None  # None: this process was not told, but perhaps the one that started it


def rank() -> int:
    """This worker's rank among all of the run, from 0; 0 outside of workers.

    The same in processes of its loaders, and as `self.global_rank` in a Module.
    """
    return _here().rank


def world_size() -> int:
    """How many workers the run has; 1 outside of workers."""
    return _here().world_size


def data_part() -> tuple[int, int]:
    """Which part of the data this process is to read, of how many equal ones: for datasets that shard themselves.

    Workers that read the same batches (`"dp"`, those of a node with `"ddp2"`) have the same part. In a process of a
    loader, it is that process's part of its worker's.

    Example:
        ```python
        class Lines(IterableDataset):
            def __iter__(self):
                part, parts = rt.data_part()
                return itertools.islice(open("lines.txt"), part, None, parts)
        ```
    """
    here, processes = _here(), None
    if "torch.utils.data" in sys.modules:
        from torch.utils.data import get_worker_info

        processes = get_worker_info()
    if processes is None:
        return here.part, here.parts
    return here.part * processes.num_workers + processes.id, here.parts * processes.num_workers


def take_place(ranks: Ranks, part: int | None = None, parts: int | None = None) -> Callable[[], None]:
    """Say where this process, and what it starts, is from now on; call what this returns to go back."""
    global _place
    before, told = _place, os.environ.get(_VARIABLE)
    _place = PlaceInRun(
        ranks.rank,
        ranks.world_size,
        ranks.rank if part is None else part,
        ranks.world_size if parts is None else parts,
    )
    _tell(None if _place == PlaceInRun() else ",".join(map(str, _place)))

    def leave() -> None:
        global _place
        _place = before
        _tell(told)

    return leave


def _tell(text: str | None) -> None:
    """Leave word for processes that this one starts anew."""
    if text is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = text


def advise(error: BaseException) -> None:
    """Where user code has asked torch for its rank in vain, add to the error how to ask so that it works everywhere."""
    if "process group has not been initialized" in str(error) and not getattr(error, "__notes__", None):
        error.add_note(
            "One worker has no process group. raytrainer.rank() and raytrainer.world_size() work with any number of "
            "workers: DistributedSampler(dataset, num_replicas=raytrainer.world_size(), rank=raytrainer.rank()). "
            "So does self.all_gather(...) of a Module; other collectives need an if raytrainer.world_size() > 1."
        )


def _here() -> PlaceInRun:
    if _place is not None:
        return _place
    told = os.environ.get(_VARIABLE)
    return PlaceInRun() if told is None else PlaceInRun(*map(int, told.split(",")))
