"""`PiecesInSegments`: pieces of tensors in one node's memory segments, read and written where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.part_file import PartPlan, PartRecord
from raytrainer.driver.workers.ray_parts import PiecesInRay
from raytrainer.driver.workers.ray_segments import Lease
from raytrainer.errors import CheckpointError
from raytrainer.memory_segments import Segment
from raytrainer.worker.actor.pieces_apart import PieceInSegment, bytes_there

__all__ = ["PiecesInSegments"]


class PiecesInSegments(PiecesInRay):
    """The pieces of workers of one node, in memory segments.

    Args:
        layouts: See `PiecesInRay`.
        lease: What keeps them.
        lost: The error for what is gone, by a reason.

    Raises:
        CheckpointError: They are gone.
    """

    def __init__(
        self,
        layouts: Sequence[Mapping[str, Mapping[str, Any]]],
        lease: Lease,
        lost: Callable[[str], CheckpointError],
    ) -> None:
        try:
            self._handed = lease.generations.handed(lease.slot)
        except CheckpointError as error:
            raise lost(str(error)) from None
        self.lease = lease
        places = [
            {key: handed.bytes_of(key) for key in layout} for handed, layout in zip(self._handed, layouts, strict=True)
        ]
        super().__init__(layouts, places, [lease.generations.node] * len(layouts), lost)

    def _piece(self, rank: int, key: str, at: Mapping[str, Any]) -> Any:
        return PieceInSegment(self._refs[rank][key], self._nodes[rank], at["dtype"], at["shape"])

    def look(self) -> None:
        """See `PiecesInRay.look`."""
        segments = [handed.segment for handed in self._handed]
        if all(segment.is_there() for segment in segments):
            return
        asked = ray.remote(num_cpus=0, max_retries=0)(_lacking).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(self._nodes[0], soft=False), name="raytrainer-look"
        )
        try:
            lacking = ray.get(asked.remote(segments))
        except RayError as error:
            raise self._lost(f"the node of the shards is gone ({error})") from None
        if lacking:
            raise self._lost(f"the shards of ranks {lacking} are gone with the processes that had them")

    def _fetch(self, rank: int) -> Mapping[str, Any]:
        places: Mapping[str, Any] = self._refs[rank]
        if self._handed[rank].segment.is_there():
            return places
        return {key: partial(bytes_there, place, self._nodes[rank]) for key, place in places.items()}

    def write(self, new: NewCheckpoint, plans: Mapping[int, PartPlan]) -> dict[int, PartRecord]:
        """See `PiecesElsewhere.write`."""
        try:
            return super().write(new, plans)
        except CheckpointError:
            self.look()  # which says so where that is why
            raise


def _lacking(segments: Sequence[Segment]) -> list[int]:
    """The ranks whose segments are gone."""
    return [rank for rank, segment in enumerate(segments) if not segment.is_there()]
