"""The moment to go on from after a loss, of what the workers that are left have recorded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.workers.worker_group import Recorded
from raytrainer.plan.common_moment import common_moment
from raytrainer.tensor_packing import unpack
from raytrainer.worker.step_records import RecordedMoments

__all__ = ["common_record"]

log = logging.getLogger("raytrainer")

#: Seconds for workers that wait for nothing to tell.
TELLING = 30.0


def common_record(actors: Sequence[Any], chunks: Collection[int]) -> Recorded | None:
    """The newest moment that all workers of before have recorded, from those that are left; None: there is none.

    Args:
        actors: Of the group that goes on.
        chunks: Those whose beginning is known.
    """
    asked = [actor.recorded.remote() for actor in actors]
    try:
        wait_for(asked, TELLING)
        found: list[tuple[Any, RecordedMoments]] = [
            (actor, told) for actor, told in zip(actors, ray.get(asked, timeout=0.1), strict=True) if told is not None
        ]
        if not found:
            return None
        chosen = common_moment(found[0][1].written, {told.rank: told.copied for _, told in found}, chunks)
        if chosen is None:
            return None
        moment, holder = chosen
        state = next(actor for actor, told in found if told.rank == holder).recorded_state.remote(moment)
        wait_for([state], TELLING)
        records, tensors = ray.get(state, timeout=0.1)
    except RayError as error:
        log.info("What was recorded of the latest steps cannot be had (%s).", str(error).splitlines()[0])
        return None
    return Recorded(moment[0], records, unpack(tensors))
