"""Starting workers' actors in their reservations, and having them join a process group."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.session import nodes_alive
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.errors import WorkerLostError
from raytrainer.plan.ranks import Ranks
from raytrainer.worker.actor.actor import RemoteWorker
from raytrainer.worker.actor.place import Place
from raytrainer.worker.actor.staging_worker import ASIDE, StagingWorker

__all__ = ["START", "PlacesWatch", "actor_class", "join", "options_in", "start_actors"]

#: Seconds for a worker's process to start, its runtime environment included, and for all to join the group.
START = 1800.0

#: Seconds between looks at reservations, and those that Ray gets to move one to another node.
LOOK_EVERY, MOVING = 2.0, 10.0


class PlacesWatch:
    """Whether workers that start still have their places: for one whose node has gone Ray would wait for ever.

    Args:
        slots: Where they start.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._next = time.monotonic() + LOOK_EVERY
        self._gone: float | None = None  # since when one is

    def look(self, answered: Collection[int]) -> None:
        """To be called now and then.

        Raises:
            WorkerLostError: One is gone.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_EVERY
        living = nodes_alive()
        groups = {slot.group.id: slot.group for slot in self._slots}
        tables = {key: ray.util.placement_group_table(group) for key, group in groups.items()}
        # one that has been removed meanwhile has none
        nodes = {key: table.get("bundles_to_node_id", {}) for key, table in tables.items()}
        gone = [i for i, slot in enumerate(self._slots) if nodes[slot.group.id].get(slot.bundle) not in living]
        self._gone = (self._gone or now) if gone else None
        if self._gone is not None and now - self._gone >= MOVING:
            raise WorkerLostError(gone[0], "its node has gone while it started, and no other has room")


def actor_class(body: type, stages: bool) -> Any:
    """Ray's class of actors with this body; `stages`: which has what a `StagingWorker` has."""
    return ray.remote(concurrency_groups={ASIDE: 1})(body) if stages else ray.remote(body)


def options_in(slot: Slot, cpus: float, gpus: int) -> dict[str, Any]:
    """Ray's options for an actor in a reservation."""
    strategy = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy}


def start_actors(slots: Sequence[Slot], request: Request, stages: bool) -> list[Any]:
    """Begin to start a worker in each of these reservations, which it uses up."""
    worker = actor_class(StagingWorker if stages else RemoteWorker, stages)  # which Ray pickles and sends once
    return [worker.options(**options_in(slot, slot.cpus, int(request.gpu))).remote() for slot in slots]


def join(
    answers: Answers, actors: Sequence[Any], ranks: Sequence[Ranks], places: Sequence[Place], gpu: bool, patience: float
) -> None:
    """Have workers form a process group, by rank, within so many seconds."""
    one_node = ranks[0].num_nodes == 1
    # on one machine the loopback interface is fast and always there
    host = "127.0.0.1" if one_node else places[0].address
    port = 0
    if len(actors) > 1:
        port = answers.all([actors[0].serve.remote(host, len(actors))], patience, "serving a rendezvous")[0]
    joining = [
        actor.join.remote(own, host, port, host if one_node else place.address, gpu)
        for actor, own, place in zip(actors, ranks, places, strict=True)
    ]
    answers.all(joining, patience, "joining the process group")
