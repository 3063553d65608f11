"""`PiecesElsewhere`: pieces of tensors in other processes' memory, which are written to a checkpoint from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.part_file import PartPlan, PartRecord

__all__ = ["PiecesElsewhere"]


class PiecesElsewhere(Sequence[Mapping[str, Mapping[str, Any]]], ABC):
    """By rank the pieces, by their keys, as a state has them; their "data" is `Stored`, and has a `dtype`."""

    @abstractmethod
    def write(self, new: NewCheckpoint, plans: Mapping[int, PartPlan]) -> dict[int, PartRecord]:
        """Have each worker's file written; what was written, by rank.

        Args:
            new: The checkpoint, which expects these files.
            plans: What each rank's file is to have; ranks without one have none.

        Raises:
            CheckpointError: That cannot be done. By then nobody writes any more.
        """
