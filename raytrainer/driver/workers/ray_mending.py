"""Lost workers replaced in place: the others keep their processes, and a spare or a new one comes for each lost one."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.session import nodes_alive
from raytrainer.driver.workers.ray_starting import options_in
from raytrainer.errors import ResourceError
from raytrainer.signals import wait_until
from raytrainer.worker.actor.actor import Failure
from raytrainer.worker.actor.place import Place

__all__ = ["await_room", "free_survivors", "hand_over"]

log = logging.getLogger("raytrainer")

#: Seconds for a worker to come out of what it was at, and to leave the group. One that does not is replaced too.
LEAVING = 8.0

#: Seconds for Ray to give a lost worker's GPU to the one that holds it for a spare, and for the spare to take it over.
CLAIMING = 30.0

#: Seconds for Ray to move a reservation from a node that is gone, if another has room; and between looks.
MOVING, LOOK_EVERY = 3.0, 0.05


def free_survivors(actors: Sequence[Any], lost: Collection[int], staging: bool) -> list[int]:
    """Have the lost ones ended, and all others leave the group; the ranks of those that have.

    Sockets that close with a process tell gloo's waits in others. NCCL's do not end by themselves: a second thread ends
    them, and is done before anything else is said to that worker.

    Args:
        actors: By rank.
        lost: Ranks that are gone, or are not to be waited for.
        staging: Whether workers have such a thread.
    """
    for rank in lost:
        with contextlib.suppress(RayError):
            ray.kill(actors[rank])
    left = [rank for rank in range(len(actors)) if rank not in lost]
    if staging and len(actors) > 1:
        left = _answering([(rank, actors[rank].abort_groups.remote()) for rank in left], lambda answer: answer is True)
    return _answering([(rank, actors[rank].leave.remote()) for rank in left], lambda answer: answer is None)


def _answering(asked: Sequence[tuple[int, Any]], well: Any) -> list[int]:
    """The ranks of those who answer in time, and as they should."""
    refs = [ref for _, ref in asked]
    wait_for(refs, LEAVING)
    answered = set(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else set()
    found = []
    for rank, ref in asked:
        if ref not in answered:
            log.info("Rank %d does not come back within %.0f s, and is replaced too.", rank, LEAVING)
            continue
        try:
            answer = ray.get(ref)
        except RayError as error:
            log.info("Rank %d is gone too: %s", rank, str(error).splitlines()[0])
            continue
        if well(answer):
            found.append(rank)
        else:
            log.info("Rank %d does not come back, and is replaced too: %s", rank, _text(answer))
    return found


def _text(answer: Any) -> str:
    return answer.message if isinstance(answer, Failure) else "what it does in NCCL cannot be ended from outside"


def await_room(place: Place, slot: Slot) -> None:
    """Wait until a lost worker's reservation can be used again. If its node is gone, Ray may move it to another.

    Raises:
        ResourceError: It does not, or not soon.
    """

    def there(at_most: float) -> bool:
        living = nodes_alive()
        if place.node_id in living:
            return True
        table = ray.util.placement_group_table(slot.group)
        if table["state"] == "CREATED" and table["bundles_to_node_id"][slot.bundle] in living:
            return True
        time.sleep(min(at_most, LOOK_EVERY))
        return False

    if not wait_until(there, MOVING):
        raise ResourceError(f"the node {place.address} of a lost worker is gone, and no other has room")


def hand_over(spare: Any, place: Place, slot: Slot, request: Request) -> Any:
    """Give a spare what a lost worker had; an actor that holds that of Ray, as long as it lives.

    Raises:
        ResourceError: It is somebody else's by now. The spare has ended.
    """
    claim: Any = None
    try:
        claim = _claim(place, slot, request)
        taken = spare.take_over.remote(place.share, place.pid)
        wait_for([taken], CLAIMING)
        answer = ray.get(taken, timeout=0.1)
        if isinstance(answer, Failure):
            raise ResourceError(answer.message)
    except BaseException:
        for actor in (spare, claim):
            if actor is not None:
                with contextlib.suppress(RayError):
                    ray.kill(actor)
        raise
    return claim


def _claim(place: Place, slot: Slot, request: Request) -> Any:
    """An actor that uses a reservation up, so that Ray gives it to nobody else while a spare works there.

    Raises:
        ResourceError: Its GPU is not to be had.
    """

    class Claim:
        """Holds resources, and imports nothing."""

        def gpus(self) -> list[str]:
            import ray

            return [str(value) for value in ray.get_gpu_ids()]

    claim = ray.remote(Claim).options(**options_in(slot, slot.cpus, int(request.gpu))).remote()
    if not request.gpu:
        return claim
    asked = claim.gpus.remote()
    wait_for([asked], CLAIMING)
    try:
        found = ray.get(asked, timeout=0.1)
        if found != place.share.ids:
            raise ResourceError(f"Ray gives the GPUs {found} in place of {place.share.ids}")
    except BaseException:
        ray.kill(claim)
        raise
    return claim
