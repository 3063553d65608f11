"""States of workers that are actors: copied into Ray's shared memory, and fetched from there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from raytrainer.checkpointing.pieces import KEY
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.errors import CheckpointError, StateLostError
from raytrainer.signals import wait_until
from raytrainer.tensor_packing import unpack
from raytrainer.worker.actor.actor import Failure
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
    """

    def __init__(self, group: CapturedGroup, actors: Sequence[Any], answers: Answers, staged: bool) -> None:
        self._group, self._actors, self._answers, self._staged = group, actors, answers, staged
        self._handing: list[Any] = []  # answered when the newest state is in Ray's shared memory

    def capture(self, weights_only: bool = False, final: bool = False) -> Callable[[], list[dict[str, Any]]]:
        """Have the state copied into Ray's shared memory; return what fetches it from there.

        The copies are return values of actor calls: the driver owns them, so they outlive the actor. On several nodes
        a second node holds one too.
        """
        if not self._staged:
            refs = [actor.capture.remote(weights_only, final) for actor in self._actors]
            self._wait_for_copies([own for own, _ in refs])
            return lambda: self._fetch(refs)
        # one state at a time, so that memory stays bounded
        self._wait_for_copies(self._handing)
        own = [actor.stage.remote(weights_only, final) for actor in self._actors]
        self._wait_for_copies(own)
        handed = [actor.hand_over.remote() for actor in self._actors]
        self._handing = [done for _, done in handed]
        refs = [(mine, common) for mine, (common, _) in zip(own, handed, strict=True)]
        return lambda: self._fetch(refs)

    def _wait_for_copies(self, refs: Sequence[Any]) -> None:
        self._answers.all(refs, Wait.TRAINING.seconds(self._group.hang_timeout), "hang_timeout")

    def _fetch(self, refs: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """Every worker's part of a state: (its own, the common one).

        Raises:
            StateLostError: A worker died before it had handed over its own part, or all copies of the common one are
                gone.
        """
        parts = []
        for rank, (own, common) in enumerate(refs):
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
        if self._handing:
            with contextlib.suppress(RayError):
                wait_until(
                    lambda piece: not ray.wait(self._handing, num_returns=len(self._handing), timeout=piece)[1], seconds
                )
