"""`RecordedState`: what all workers have recorded of one step, put together as a snapshot would be."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

from raytrainer.driver.saving.checkpoint_writer import Captured
from raytrainer.driver.workers.worker_group import Copies, Recorded
from raytrainer.messages import TrainReport
from raytrainer.tensor_packing import replaced, unpack
from raytrainer.worker.step_copies import Arrives
from raytrainer.worker.step_records import InCopies

__all__ = ["RecordedState"]


@dataclass(frozen=True)
class RecordedState:
    """A state within a chunk.

    The driver has no part of its own in it: it goes back to the chunk's beginning, and takes up what workers would have
    reported if the chunk had ended there.

    Attributes:
        state: The workers' state then, with the driver's part of the chunk's beginning.
        reports: By rank, of the chunk so far.
    """

    state: dict[str, Any]
    reports: list[TrainReport]

    @classmethod
    def of(cls, found: Recorded, driver: dict[str, Any]) -> RecordedState:
        """It, of records and `driver`'s part."""
        parts, reports = list[dict[str, Any]](), list[TrainReport]()
        for record in found.records:
            content, packed, sums, report = pickle.loads(record)
            own, common = replaced(unpack(pickle.loads(content)), Arrives, partial(_of, unpack(packed)))
            common = replaced(common, InCopies, lambda held: found.tensors[held.name])
            parts.append({"own": {**own, "metrics": sums}, **common})
            reports.append(report)
        return cls(Captured(Copies(lambda: (parts, None)), driver).resolve(), reports)


def _of(tensors: list[Any], place: Arrives) -> Any:
    return tensors[place.index]
