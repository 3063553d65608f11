"""Objects of a run that is over no longer know each other, so that what they knew goes at once.

They form circles, which Python looks for when there are many new objects, however large these are. A loop that makes
and drops modules would have several of them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from raytrainer.worker.worker_run import WorkerRun

__all__ = ["unlink"]


def unlink(over: Iterable[object], release: bool = False) -> None:
    """Empty what a run consisted of, and nobody uses any more: the run and its loops. None is left out.

    Args:
        over: These.
        release: Have the run undo first what it has changed in this process.
    """
    for part in over:
        try:
            if isinstance(part, WorkerRun) and release:
                part.release()
        finally:
            if isinstance(part, WorkerRun):
                unlink((part.data, part.hooks, part.slices, part.recorder))
            if part is not None:
                vars(part).clear()
