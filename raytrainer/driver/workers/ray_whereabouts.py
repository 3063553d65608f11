"""Asking workers where they are, from beside them: they may hang, and not hear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.plan.where_it_is import Silence, Whereabouts, whereabouts
from raytrainer.worker.actor.place import Place
from raytrainer.worker.actor.stack_dump import ask

__all__ = ["ask_where"]

#: Seconds for a worker's process to write where it is, once it is asked.
WRITING = 5.0


def ask_where(places: Sequence[Place], patience: float, silence: Silence) -> list[Whereabouts]:
    """Where each worker is, by rank; those that have not answered after `patience` seconds are told so."""
    remote = ray.remote(num_cpus=0, max_retries=0)(_asked)
    asked: list[Any] = []
    for place in places:
        there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        asked.append(remote.options(scheduling_strategy=there).remote(place.pid, place.stacks))
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=patience) if asked else ([], [])
    for ref in late:
        ray.cancel(ref, force=True)
    seconds = silence.seconds  # now: a worker that hangs may have begun to after it was asked
    return [
        whereabouts(rank, f"{place.host}, pid {place.pid}", _text(ref) if ref in ready else "", seconds)
        for rank, (place, ref) in enumerate(zip(places, asked, strict=True))
    ]


def _asked(pid: int, path: str | None) -> str:
    return "" if path is None else ask(pid, path, WRITING)


def _text(ref: Any) -> str:
    try:
        return str(ray.get(ref))
    except Exception:  # its node is gone, or the process is
        return ""
