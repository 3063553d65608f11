"""`Generations`: states of one node's workers in memory that outlives these, and who needs which of them.

A worker copies its shards to a segment; the holder, a process of that node, has it open too. There is a segment for
each worker and *slot*, and a slot is written to again when nobody needs the state in it any more: when there is no
`Lease` of it. A state counts only when all workers have copied theirs, so that no torn one is ever used.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.workers.worker_group import Room
from raytrainer.errors import CheckpointError
from raytrainer.memory_segments import Handed, Segment
from raytrainer.worker.actor.actor import Failure
from raytrainer.worker.actor.holder import Holder

__all__ = ["Generations", "Lease"]

log = logging.getLogger("raytrainer")

#: Where weights alone go, if there is room for one state only.
WEIGHTS = -1

#: Seconds for the holder to start, and to have what workers have handed over.
PATIENCE = 60.0


class Lease:
    """As long as it is there, the state in a slot is. (Whoever has it, has the holder, too.)

    Attributes:
        generations: Those that it is one of.
        slot: Its slot.
    """

    def __init__(self, generations: Generations, slot: int) -> None:
        self.generations, self.slot = generations, slot

    def complete(self) -> bool:
        """Whether the death of workers no longer reaches it."""
        return self.generations.is_held(self.slot, 0.0)


class Generations:
    """The states of one group, or of groups that continue it with as many workers in the same places.

    Args:
        node: Ray's id of the node.
        pids: The workers' processes, by rank.

    Attributes:
        count: How many states are kept: 2, or 1 where main memory has no room for another one; None: not yet known.
        former: Processes that have been such workers.
    """

    def __init__(self, node: str, pids: Sequence[int]) -> None:
        self.node, self.pids, self.size = node, list(pids), len(pids)
        self.former: set[int] = set()
        self.count: int | None = None
        self._holder: Any = None
        self._slots, self._retired = [0, 1], False
        self._probing: Any = None
        self._newest: int | None = None  # the slot that was filled last,
        self._full = False  # and whether with more than weights
        self._handed: dict[int, list[Any]] = {}  # by slot, references to what the workers say of it
        self._held: dict[int, Any] = {}  # by slot, a reference to what the holder says
        self._leases: dict[int, weakref.ref[Lease]] = {}

    # ---------------------------------------------------------------- slots

    def free(self, weights_only: bool) -> int | None:
        """A slot that may be written to; None: all are needed."""
        slots = [WEIGHTS] if weights_only and self.count == 1 else list(self._slots)
        slots += [slot for slot in self._leases if slot > 1]
        return next((slot for slot in slots if not self._leased(slot)), None)

    def room(self, weights_only: bool) -> Room:
        """See `WorkerGroup`."""
        return Room(self.free(weights_only) is not None, single=self.count == 1 and not weights_only)

    def take(self, weights_only: bool) -> int:
        """A slot that may be written to, if need be one more. What is there counts as gone."""
        slot = self.free(weights_only)
        if slot is None:
            gc.collect()  # errors of checkpoints that could not be written know each other, and what was to be written
            slot = self.free(weights_only)
        if slot is None:
            slot = max(1, *self._leases) + 1
            log.warning(
                "A further copy of the state is kept in main memory, since all others are still held: whoever calls "
                "`capture` is to let go of what it gives."
            )
        return slot

    def needed(self) -> list[int]:
        """The slots whose state somebody needs."""
        return [slot for slot in list(self._leases) if self._leased(slot)]

    def _leased(self, slot: int) -> bool:
        return slot in self._leases and self._leases[slot]() is not None

    def lease(self, slot: int, handed: Sequence[Any], full: bool) -> Lease:
        """What the workers have copied to a slot is a state.

        Args:
            slot: Where it is.
            handed: By rank, references to the `Handed`.
            full: Whether it is more than weights.
        """
        self._handed[slot], self._newest, self._full = list(handed), slot, full
        lease = Lease(self, slot)
        self._leases[slot] = weakref.ref(lease, lambda _: self._let_go())
        self._hold(slot)
        return lease

    def reserve(self, actors: Sequence[Any]) -> None:
        """Have workers take the memory for a second state beside training, if there is room."""
        newest = self._newest
        if newest in (0, 1) and self._full and self.count != 1:
            for actor in actors:
                actor.reserve_like.remote(1 - newest, newest, *self._handed[newest])

    # ---------------------------------------------------------------- the holder

    def _hold(self, slot: int) -> None:
        self._held[slot] = self._holding().hold.remote(slot, self.pids, *self._handed[slot])

    def _holding(self) -> Any:
        if self._holder is None:
            place = NodeAffinitySchedulingStrategy(self.node, soft=False)
            self._holder = ray.remote(num_cpus=0)(Holder).options(scheduling_strategy=place).remote()
        return self._holder

    def probe(self, samples: Sequence[Any]) -> None:
        """Find out whether processes of that node may have each other's memory, of which these are samples."""
        self._probing = self._holding().probe.remote(*samples)

    def refused(self) -> str | None:
        """Why they may not; None: they may."""
        if self._probing is None:
            return None
        asked, self._probing = self._probing, None
        wait_for([asked], PATIENCE)
        try:
            reason: str | None = ray.get(asked, timeout=0.1)
        except RayError as error:
            return f"no process can be had for it: {str(error).splitlines()[0]}"
        return reason

    def is_held(self, slot: int, patience: float) -> bool:
        """Whether the holder has said that it has what is in a slot."""
        asked = self._held[slot]
        wait_for([asked], patience)
        try:
            return bool(ray.wait([asked], timeout=0)[0]) and None not in ray.get(asked)
        except RayError:
            return False

    def await_held(self, patience: float) -> None:
        """Give the holder this time to have the newest state."""
        if self._newest is not None:
            self.is_held(self._newest, patience)

    def settle(self) -> bool:
        """See that the newest state is held, by another holder where one has ended; whether it is."""
        newest = self._newest
        if newest is None:
            return True
        if self.is_held(newest, PATIENCE):
            if self.count is None and self._full:
                self._decide(newest)
            return True
        if not self._leased(newest) or not self._holder_has_ended() or not self._all_handed(newest):
            return True  # nobody needs it, or a worker is lost, which whoever asks it next is told
        log.info("The process that holds the workers' state has ended; another one takes its place.")
        self._holder = None
        for slot in self.needed():
            self._hold(slot)
        return self.is_held(newest, PATIENCE) or not self._holder_has_ended()

    def _holder_has_ended(self) -> bool:
        asked = self._holding().keep.remote(list(self._handed))
        wait_for([asked], PATIENCE)
        try:
            ray.get(asked, timeout=0.1)
        except RayError:
            return True
        return False

    def _decide(self, slot: int) -> None:
        handed: list[Handed] = ray.get(self._handed[slot])
        room = all(each.room for each in handed)
        self.count = 2 if room else 1
        if not room:
            self._slots = [slot]
        gigabytes = sum(each.segment.size for each in handed) / 2**30
        log.info(
            "The state of %d workers takes %.2f GiB of their node's main memory, %s.", self.size, gigabytes,
            "twice: the newest two are kept" if room else "once, as there is no room for two: while it is copied there "
            "is no other, and who loses a worker meanwhile goes on from the newest checkpoint",
        )  # fmt: skip

    def _all_handed(self, slot: int) -> bool:
        try:
            return all(isinstance(handed, Handed) for handed in ray.get(self._handed[slot]))
        except RayError:
            return False

    def continued(self, pids: Sequence[int]) -> set[int]:
        """A group of these workers, by rank, goes on; the processes that were in their place."""
        self.former = (self.former | set(self.pids)) - set(pids)
        self.pids, self._retired = list(pids), False
        return self.former

    def retire(self) -> None:
        """No workers use these any more: what nobody needs goes, and the holder with the last that is needed."""
        needed = self.needed()
        if self._newest in needed:
            self.await_held(PATIENCE)  # the workers let go of it now
        if self._holder is not None and needed:
            self._holder.keep.remote(needed)
        self.leave()

    def leave(self) -> None:
        """The group has ended: the memory goes with the last state that is needed, unless another group continues."""
        self._retired = True
        self._let_go()

    def _let_go(self) -> None:
        """A lease has ended. Ray ends an actor that nobody knows any more."""
        if self._retired and not self.needed():
            self._holder = None

    # ---------------------------------------------------------------- what there is

    def handed(self, slot: int) -> list[Handed]:
        """By rank, what is in a slot, and where.

        Raises:
            CheckpointError: A worker has died before it could say.
        """
        try:
            found: list[Any] = ray.get(self._handed[slot])
        except RayError as error:
            raise CheckpointError(f"a worker had not yet handed over its shards ({error})") from None
        failed = [answer.message for answer in found if isinstance(answer, Failure)]
        if failed:
            raise CheckpointError(f"a worker's shards: {failed[0]}")
        try:
            segments: Sequence[Segment | None] = ray.get(self._held[slot])
        except RayError:  # the holder is gone
            segments = [None] * self.size
        # where it has not been seen, a worker may have it
        ways = [
            segment or each.segment.also_in(pid) for each, segment, pid in zip(found, segments, self.pids, strict=True)
        ]
        return [replace(each, segment=segment) for each, segment in zip(found, ways, strict=True)]

    def kept(self) -> list[dict[int, Handed]]:
        """By rank, what is in each slot that a worker has filled."""
        found: list[dict[int, Handed]] = [{} for _ in range(self.size)]
        for slot in self._handed:
            if self._all_handed(slot):
                for rank, handed in enumerate(self.handed(slot)):
                    found[rank][slot] = handed
        return found
