"""Splitters' processes, kept for the next run, since to start one takes a second.

As what `prepared.py` keeps, they go with the last workers that idle.
"""

from __future__ import annotations

import logging
from typing import Any

from raytrainer.data.ray.splitter import Splitter

__all__ = ["forget", "give_back", "new", "take"]

log = logging.getLogger("raytrainer")

#: Processes to keep, at most: for training and validation.
KEPT = 2

#: Seconds that one may take to end its latest execution.
PATIENCE = 5.0

_spare: list[tuple[str, Any]] = []  # with the Ray that they are of


def take(training: bool, batch_size: int, drop_last: bool, session: int) -> Any:
    """An actor for a run, kept or new; sessions up to this one are of earlier runs."""
    cluster = _here()
    while _spare:
        owner, actor = _spare.pop()
        if owner == cluster:
            actor.begin.remote(training, batch_size, drop_last, session)
            return actor
    return new(training, batch_size, drop_last)


def new(training: bool, batch_size: int, drop_last: bool) -> Any:
    """An actor of its own."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # no CPU: it only passes references on
    affinity = NodeAffinitySchedulingStrategy(_here(), soft=True)
    return (
        ray.remote(num_cpus=0)(Splitter).options(scheduling_strategy=affinity).remote(training, batch_size, drop_last)
    )


def give_back(actor: Any) -> None:
    """The run is over: keep the process, without any execution, or end it."""
    import ray

    if not ray.is_initialized():
        return
    if len(_spare) < KEPT and _answers(actor.rest.remote()):
        _spare.append((_here(), actor))
    else:
        _kill(actor)


def _here() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def forget() -> None:
    """End those that are kept."""
    while _spare:
        _kill(_spare.pop()[1])


def _kill(actor: Any) -> None:
    import ray

    if ray.is_initialized():
        try:
            ray.kill(actor)
        except Exception as error:  # of another Ray, or dead already
            log.debug("a splitter could not be ended", exc_info=error)


def _answers(answer: Any) -> bool:
    """Whether a call has been obeyed, within some seconds."""
    import ray

    try:
        ray.get(answer, timeout=PATIENCE)
    except Exception as error:  # it is hung, or dead
        log.debug("a splitter does not answer", exc_info=error)
        return False
    return True
