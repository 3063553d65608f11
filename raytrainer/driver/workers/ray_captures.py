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
from raytrainer.driver.workers.worker_group import Copies
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
        copies_shards: Whether that run has shards, and goes on after a loss.
    """

    broken: bool
    hang_timeout: float | None
    copies_shards: bool


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
        self._seconds: weakref.ref[SecondCopies] | None = None
        self._handing: list[Any] = []  # answered when the newest state is in Ray's shared memory

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        """Have the state copied into Ray's shared memory.

        The copies are return values of actor calls: the driver owns them, so they outlive the actor. On several nodes
        a second node holds one too.
        """
        seconds = self._group.copies_shards and not weights_only and not final
        if not self._staged:
            refs = [actor.capture.remote(weights_only, final) for actor in self._actors]
            self._wait_for_copies([own for own, _, _ in refs])
            return self._copies(refs, [], seconds)
        # one state at a time, so that memory stays bounded
        self._wait_for_copies(self._handing)
        own = [actor.stage.remote(weights_only, final) for actor in self._actors]
        self._wait_for_copies(own)
        handed = [actor.hand_over.remote() for actor in self._actors]
        self._handing = [done for _, _, done in handed]
        refs = [(mine, common, pieces) for mine, (common, pieces, _) in zip(own, handed, strict=True)]
        return self._copies(refs, self._handing, seconds)

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
        self, refs: Sequence[Sequence[Any]], held: SecondCopies | None
    ) -> tuple[list[dict[str, Any]], PiecesElsewhere | None]:
        """A state, of which pieces stay where they are. What is `held` is as long as the state may be asked for."""
        parts = self._fetch(refs)
        layouts = [part.pop(KEY, None) for part in parts]
        if any(layout is None for layout in layouts):
            return parts, None
        pieces = PiecesInRay(layouts, [pieces for _, _, pieces in refs], self._nodes, self._lost)
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
        """Give workers that live this time to hand over the newest state, whatever else they wait for."""
        with contextlib.suppress(RayError):
            wait_for(self._handing, seconds)


def _all_well(answers: Sequence[Any]) -> bool:
    """Whether all that was asked for has been done."""
    if not answers or ray.wait(list(answers), num_returns=len(answers), timeout=0)[1]:
        return not answers
    try:
        return False not in ray.get(list(answers))
    except RayError:
        return False
