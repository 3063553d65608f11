"""`Crew`: the actors of a group, which may outlive it: where some are lost, the others and new ones form another."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.reservation import place
from raytrainer.driver.workers.edited_modules import EditedModules
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.driver.workers.ray_mending import await_room, free_survivors, hand_over
from raytrainer.driver.workers.ray_spares import Spares
from raytrainer.driver.workers.ray_starting import START, PlacesWatch, start_actors
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.plan.recoveries import Continuity
from raytrainer.plan.versions import differences
from raytrainer.quick_imports import end_importing
from raytrainer.worker.actor.place import Place, own_versions
from raytrainer.worker.worker import Worker

__all__ = ["Crew", "compare_versions"]

log = logging.getLogger("raytrainer")

#: As `START`, where lost workers are replaced: it is quick, or all start anew.
MENDING = 30.0


class Crew:
    """Workers and those that wait to become some.

    Args:
        request: What was asked of Ray.
        slots: A reservation for each worker; without any, `start` sees to them.
        stages: Whether workers are `StagingWorker`s.

    Attributes:
        actors: The workers, in the order of `slots`.
        spares: Wait to take lost workers' places.
        continuity: How many workers there were before the group was formed anew.
        modules: What they may have imported.
        patience: Seconds for workers to start, and to form a group.
    """

    def __init__(self, request: Request, slots: Sequence[Slot], stages: bool) -> None:
        self._request, self._stages = request, stages
        self.slots = list(slots)
        self.actors: list[Any] = []
        self.spares = Spares(stages)
        self.continuity = Continuity()
        self.modules = EditedModules()
        self.patience = START
        self._claims: list[Any | None] = []  # beside each worker that has been a spare: what holds its resources

    def start(self, answers: Answers, timeout: float) -> list[Place]:
        """Start workers where there are none yet, and put all in order; where they are, by rank.

        Args:
            answers: Of their group.
            timeout: Seconds to wait for places, where they have none.

        Raises:
            ResourceError: These are not to be had.
        """
        self.slots = self.slots or place(self._request, timeout, self._begin)
        self._begin(self.slots)
        asked = [actor.where.remote(self._request.gpu) for actor in self.actors]
        end_importing()
        self.modules.note()  # now, while they start: it takes a moment
        places: list[Place] = answers.all(asked, self.patience, "starting", watch=PlacesWatch(self.slots))
        order = _in_order(places)
        self.actors[:] = [self.actors[i] for i in order]
        self.slots, self._claims = [self.slots[i] for i in order], [self._claims[i] for i in order]
        return [places[i] for i in order]

    def _begin(self, slots: Sequence[Slot]) -> None:
        """Begin to start a worker in each of these reservations, where there is none yet."""
        self.actors += start_actors(slots[len(self.actors) :], self._request, self._stages)
        self._claims += [None] * (len(self.actors) - len(self._claims))

    def give_slots(self, places: Sequence[Place], counts: Mapping[str, int]) -> list[Slot]:
        """Hand over so many reservations on each node, by its id, to another group; the workers there end."""
        left, given = Counter(counts), list[Slot]()
        for slot, where in zip(self.slots, places, strict=True):
            if left[where.node_id] > 0:
                left[where.node_id] -= 1
                given.append(slot)
        reserved = {slot.group.id for slot in given}
        self.slots = [slot for slot in self.slots if slot.group.id not in reserved]
        return given

    def grow(self, request: Request, more: Sequence[Slot], places: Sequence[Place], counts: Mapping[str, int]) -> bool:
        """Have the workers leave their group, to form a larger one with others in further places; whether they do.

        Args:
            request: The larger group's.
            more: The further places.
            places: Where the workers are.
            counts: How many of them the larger group takes, by node. Where that is not all, they end.
        """
        if any(counts.get(node, 0) < count for node, count in Counter(place.node_id for place in places).items()):
            return False
        if len(free_survivors(self.actors, (), self._stages)) < len(self.actors):
            return False
        self._request, self.patience, self.continuity = request, START, Continuity(len(self.actors))
        self.slots += more
        return True

    def mend(self, places: Sequence[Place], lost: Collection[int]) -> None:
        """Have workers leave a group that has lost some of them, and others come in the place of these.

        Args:
            places: Where the workers were, by rank.
            lost: Ranks that are gone, or are not to be waited for.

        Raises:
            ResourceError: That cannot be done.
        """
        self.patience = MENDING
        survivors = free_survivors(self.actors, lost, self._stages)
        if not survivors and not self.spares.any_on({place.node_id for place in places}):
            raise ResourceError("none is left")
        spares = 0
        for rank in set(range(len(self.actors))) - set(survivors):
            _kill(self.actors[rank], self._claims[rank])  # what it held is free for the next one
            self.actors[rank], self._claims[rank] = self._replaced(rank, places[rank])
            spares += self._claims[rank] is not None
        self.continuity = Continuity(len(survivors), spares)

    def _replaced(self, rank: int, place: Place) -> tuple[Any, Any | None]:
        """Another actor in a lost one's place; and one that holds its resources, where the actor itself does not."""
        slot, request = self.slots[rank], self._request
        await_room(place, slot)
        while (spare := self.spares.take(place.node_id)) is not None:
            try:
                return spare, hand_over(spare, place, slot, request)
            except RayActorError as error:
                log.info("A spare worker has ended before it was needed: %s", str(error).splitlines()[0])
        return start_actors([slot], request, self._stages)[0], None

    def learn(self, places: Sequence[Place], resting: Sequence[Any], patience: float) -> None:
        """Note what workers on this machine have imported in the run that is over.

        Args:
            places: Where they are, by rank.
            resting: What each has answered, or is to answer, at the run's end; nothing before the first.
            patience: Seconds.

        Raises:
            RayError: They do not answer.
        """
        wait_for(resting, patience)
        for where, imported in zip(places, ray.get(list(resting), timeout=0.1), strict=False):
            if where.host == socket.gethostname() and isinstance(imported, dict):
                self.modules.learn(imported)

    def outdated(self) -> bool:
        """Whether workers may have imported modules that have been edited since."""
        return self.modules.outdated(bool(ray.get_runtime_context().runtime_env.get("working_dir")))

    def abandon_runs(self, seconds: float) -> None:
        """Have each drop its run.

        Raises:
            RayError: They do not answer.
        """
        wait_for(abandoned := [actor.obey.remote(Worker.abandon.__name__) for actor in self.actors], seconds)
        ray.get(abandoned, timeout=0.1)

    def end(self) -> None:
        """Kill them all."""
        _kill(*self.actors, *self._claims)
        self.spares.close()


def _kill(*actors: Any | None) -> None:
    for actor in actors:
        if actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(actor)


def _in_order(places: Sequence[Place]) -> list[int]:
    """Which is to be of rank 0, 1, ...: node by node in the order of addresses, and by GPU on each."""
    return sorted(range(len(places)), key=lambda i: (_numbers(places[i].address), places[i].node_id, places[i].gpus))


def compare_versions(places: Sequence[Place]) -> None:
    """Name what differs between driver and nodes.

    Raises:
        ConfigurationError: It cannot work.
    """
    fatal, doubtful = differences(own_versions(), {place.address: place.versions for place in places})
    if fatal:
        raise ConfigurationError(
            f"The driver and the nodes run different versions: {'; '.join(fatal)}. Install the same on both."
        )
    if doubtful:
        log.warning("The driver and the nodes run different versions: %s.", "; ".join(doubtful))


def _numbers(address: str) -> list[tuple[int, str]]:
    """A key that sorts 10.0.0.9 before 10.0.0.10."""
    return [(int(part) if part.isdigit() else -1, part) for part in address.split(".")]
