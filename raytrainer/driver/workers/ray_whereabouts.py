"""Asking workers where they are, from beside them: they may hang, and not hear."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.plan.where_it_is import Silence, Whereabouts, whereabouts
from raytrainer.worker.actor.place import Place
from raytrainer.worker.actor.stack_dump import ask, glance

__all__ = ["Asking"]

#: Seconds for a worker's process to write where it is, once it is asked.
WRITING = 5.0

#: Seconds after which those that have not answered are not waited for any more.
LATE = 30.0


class Asking:
    """Workers that have been asked where they are, and have not been waited for.

    Args:
        places: Theirs.
        silence: Of the driver, which waits for something else of them.
        main: Whether their main threads alone are to answer, which harms no process that goes on.
    """

    def __init__(self, places: Sequence[Place], silence: Silence, main: bool = False) -> None:
        remote = ray.remote(num_cpus=0, max_retries=0)(_asked)
        self._places, self._silence, self._until = places, silence, time.monotonic() + LATE
        self._refs: list[Any] = []
        for place in places:
            there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
            self._refs.append(remote.options(scheduling_strategy=there).remote(place.pid, place.stacks, main))

    def found(self, patience: float) -> list[Whereabouts]:
        """Where each worker is, by rank; those that have not answered after `patience` seconds are told so."""
        refs = self._refs
        ready, late = ray.wait(refs, num_returns=len(refs), timeout=patience) if refs else ([], [])
        for ref in late:
            ray.cancel(ref, force=True)
        seconds = self._silence.seconds  # now: a worker that hangs may have begun to after it was asked
        return [
            whereabouts(rank, f"{place.host}, pid {place.pid}", _text(ref) if ref in ready else "", seconds)
            for rank, (place, ref) in enumerate(zip(self._places, refs, strict=True))
        ]

    def __call__(self) -> list[Whereabouts] | None:
        """The same, without waiting; None: some are still to answer."""
        _, late = ray.wait(self._refs, num_returns=len(self._refs), timeout=0)
        return None if late and time.monotonic() < self._until else self.found(0.0)


def _asked(pid: int, path: str | None, main: bool) -> str:
    return "" if path is None else (glance if main else ask)(pid, path, WRITING)


def _text(ref: Any) -> str:
    try:
        return str(ray.get(ref))
    except Exception:  # its node is gone, or the process is
        return ""
