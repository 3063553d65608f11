"""States of workers that are actors: copied into Ray's shared memory, and fetched from there."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from raytrainer.checkpointing.pieces import KEY
from raytrainer.checkpointing.pieces_elsewhere import PiecesElsewhere
from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.driver.workers.ray_copies import SecondCopies
from raytrainer.driver.workers.ray_parts import PiecesInRay
from raytrainer.driver.workers.ray_segments import Generations, Lease
from raytrainer.driver.workers.ray_shared_pieces import PiecesInSegments
from raytrainer.driver.workers.worker_group import Copies, Room
from raytrainer.errors import CheckpointError, StateLostError
from raytrainer.tensor_packing import unpack
from raytrainer.worker.actor.actor import Failure
from raytrainer.worker.actor.place import Place
from raytrainer.worker.verbs import Wait

__all__ = ["RayCaptures"]

log = logging.getLogger("raytrainer")


class CapturedGroup(Protocol):
    """The group whose state is copied.

    Attributes:
        broken: Whether it has been aborted.
        hang_timeout: Seconds, of the run in progress.
    """

    broken: bool
    hang_timeout: float | None


class RayCaptures:
    """The states of one group.

    Args:
        group: The group.
        actors: Its actors, by rank.
        answers: Waits for them.
        staged: Whether they are `StagingWorker`s.
        places: Where they are.
    """

    def __init__(
        self, group: CapturedGroup, actors: Sequence[Any], answers: Answers, staged: bool, places: Sequence[Place]
    ) -> None:
        self._group, self._actors, self._answers, self._staged = group, actors, answers, staged
        self._nodes = [place.node_id for place in places]
        self._pids = [place.pid for place in places]
        self._copies_shards = self._shares = False
        self._generations: Generations | None = None  # where shards are shared, and that has begun
        self._left: Generations | None = None  # where they were until it turned out that they cannot be
        self._seconds: weakref.ref[SecondCopies] | None = None
        self._handing: list[Any] = []  # answered when the newest state is in Ray's shared memory

    def begin(self, sharded: bool, recovers: bool) -> None:
        """A run begins, or goes on with this group.

        Args:
            sharded: Whether it has shards.
            recovers: Whether it goes on after a loss.
        """
        self._copies_shards = sharded and recovers
        # of several nodes each state is to be on two of them, so that it is copied in any case
        self._shares = sharded and self._staged and len(set(self._nodes)) == 1
        self.end()

    def end(self) -> None:
        """The run is over; states of it stay where they are as long as anybody holds them."""
        for generations in (self._generations, self._left):
            if generations is not None:
                generations.retire()
        self._generations = self._left = None

    def leave(self) -> None:
        """The group has ended. Who goes on may do so from another state than its newest, and needs the memory."""
        if self._generations is not None:
            self._generations.leave()

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        """Have the state copied to where it outlives workers.

        That is Ray's shared memory: the copies are return values of actor calls, which the driver owns. On several
        nodes a second node holds one too. Shards that GPUs of one node have are in segments of main memory instead.
        """
        seconds = self._copies_shards and not weights_only and not final
        if not self._staged:
            refs = [actor.capture.remote(weights_only, final) for actor in self._actors]
            self._wait_for_copies([own for own, _, _ in refs])
            return self._copies(refs, [], seconds)
        # one state at a time, so that memory stays bounded
        self._wait_for_copies(self._handing)
        generations = self._shared()
        slot = None if generations is None else generations.take(weights_only)
        own = [actor.stage.remote(weights_only, final, slot) for actor in self._actors]
        self._wait_for_copies(own)
        handed = [actor.hand_over.remote() for actor in self._actors]
        self._handing = [done for _, _, done in handed]
        refs = [(mine, common, pieces) for mine, (common, pieces, _) in zip(own, handed, strict=True)]
        if generations is None or slot is None:
            return self._copies(refs, self._handing, seconds)
        lease = generations.lease(slot, [pieces for _, _, pieces in refs], full=not weights_only)
        if generations.count is None:
            generations.reserve(self._actors)
        done = self._handing
        return Copies(partial(self._join, refs, None, lease), lambda: _all_well(done) and lease.complete())

    # ---------------------------------------------------------------- shards in segments

    def room(self, weights_only: bool) -> Room:
        """See `WorkerGroup`."""
        self._wait_for_copies(self._handing)
        generations = self._shared()
        if generations is not None:
            return generations.room(weights_only)
        # what has been left is for files that are still written; snapshots of it are taken anew
        return Room() if self._left is None else Room(free=False, single=True)

    def prepare(self) -> None:
        """Before workers take memory for states: have them take such as is to be shared."""
        if not self._shares or self._generations is not None:
            return
        generations = Generations(self._nodes[0], self._pids)
        samples = [actor.share_memory.remote({}) for actor in self._actors]
        self._wait_for_copies(samples)
        generations.probe(samples)
        self._generations = generations

    def _shared(self) -> Generations | None:
        """The newest state being safe: what is to have the next one, if shards are shared."""
        self.prepare()
        if self._generations is not None:
            reason = self._generations.refused()
            if reason is None and not self._generations.settle():
                reason = "the process that is to hold it ends"
            if reason is not None:
                log.warning("Shards are kept in main memory twice: by workers, and by Ray, as %s.", reason)
                self._shares, self._generations, self._left = False, None, self._generations
        if self._left is not None and not self._left.needed():
            # only now: workers alone have what is there
            self._left = None
            self._wait_for_copies([actor.unshare_memory.remote() for actor in self._actors])
        return self._generations

    def take_up(self, state: Any) -> None:
        """Workers have taken up this state: where it is, in memory of a group that this one continues, they go on."""
        pieces = state.get(KEY) if isinstance(state, dict) else None
        if not isinstance(pieces, PiecesInSegments):
            return
        generations = pieces.lease.generations
        same_places = generations.node == self._nodes[0] and generations.size == len(self._actors)
        if self._generations is generations:
            return
        if not self._shares or not same_places:
            generations.retire()
            return
        kept, former = generations.kept(), generations.continued(self._pids)
        sharing = [actor.share_memory.remote(own, former) for actor, own in zip(self._actors, kept, strict=True)]
        self._wait_for_copies(sharing)
        self._generations = generations
        generations.reserve(self._actors)

    def _second_copies(self) -> SecondCopies | None:
        """Those that earlier states which are still there have, or new ones; None: there is one node."""
        if len(set(self._nodes)) == 1:
            return None
        found = None if self._seconds is None else self._seconds()
        if found is None:
            found = SecondCopies(self._nodes)
            self._seconds = weakref.ref(found)
        return found

    def _copies(self, refs: Sequence[Sequence[Any]], handing: Sequence[Any], seconds: bool) -> Copies:
        held = self._second_copies() if seconds else None
        copying = [] if held is None else held.hold([pieces for _, _, pieces in refs])
        return Copies(partial(self._join, refs, held), partial(_all_well, [*handing, *copying]))

    def _join(
        self, refs: Sequence[Sequence[Any]], held: SecondCopies | None, lease: Lease | None = None
    ) -> tuple[list[dict[str, Any]], PiecesElsewhere | None]:
        """A state, of which pieces stay where they are. What is `held` stays as long as this may be asked."""
        parts = self._fetch(refs)
        layouts = [part.pop(KEY, None) for part in parts]
        if any(layout is None for layout in layouts):
            return parts, None
        pieces: PiecesInRay
        if lease is None:
            pieces = PiecesInRay(layouts, [pieces for _, _, pieces in refs], self._nodes, self._lost)
        else:
            pieces = PiecesInSegments(layouts, lease, self._lost)
        pieces.look()
        return parts, pieces

    def _wait_for_copies(self, refs: Sequence[Any]) -> None:
        self._answers.all(refs, Wait.TRAINING.seconds(self._group.hang_timeout), "hang_timeout")

    def _fetch(self, refs: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """Every worker's part of a state, of its pieces only where they belong.

        Raises:
            StateLostError: A worker died before it had handed over its own part, or all copies of the common one are
                gone.
        """
        parts = []
        for rank, (own, common, _) in enumerate(refs):
            try:
                part = ray.get(own)
            except RayError as error:
                raise self._lost(f"rank {rank} had not yet handed over its part of the state ({error})") from None
            if isinstance(part, Failure):
                raise self._lost(f"rank {rank}'s part of the state: {part.message}")
            found = {} if part is None else {"own": unpack(part)}
            try:
                rest = ray.get(common)
                if isinstance(rest, Failure):
                    raise self._lost(f"rank {rank}'s part of the state: {rest.message}")
                found |= unpack(rest)
            except RayTaskError as error:
                raise CheckpointError(f"rank {rank} cannot hand over its state: {error}") from None
            except RayError:
                log.info("The state that rank %d kept is gone with its node; another has one too.", rank)
            parts.append(found)
        if not any("state_dict" in part for part in parts):
            raise self._lost("all copies of the state are gone")
        lacking = [rank for rank, part in enumerate(parts) if KEY not in part]
        if 0 < len(lacking) < len(parts):  # of shards each worker has its own
            raise self._lost(f"the shards of ranks {lacking} are gone")
        return parts

    def _lost(self, reason: str) -> StateLostError:
        return StateLostError(reason, lambda: self._group.broken)

    def wait_handed_over(self, seconds: float) -> None:
        """Before workers end: give those that live this time to hand over the newest state, whatever they wait for."""
        try:
            with contextlib.suppress(RayError):
                wait_for(self._handing, seconds)
                if self._generations is not None:
                    self._generations.await_held(seconds)
        finally:
            self.leave()


def _all_well(answers: Sequence[Any]) -> bool:
    """Whether all that was asked for has been done."""
    if not answers or ray.wait(list(answers), num_returns=len(answers), timeout=0)[1]:
        return not answers
    try:
        return False not in ray.get(list(answers))
    except RayError:
        return False
