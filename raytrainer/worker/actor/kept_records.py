"""What a worker that is left after a loss tells of the steps that its group has recorded."""

from __future__ import annotations

from typing import Any

from raytrainer.plan.common_moment import Moment
from raytrainer.tensor_packing import pack
from raytrainer.worker.step_records import RecordedMoments, StepRecords

__all__ = ["KeepsRecords"]


class KeepsRecords:
    """Of an actor's body: it keeps them from leaving a group until the next task comes."""

    records: StepRecords | None = None
    worker: Any = None

    def close_records(self) -> None:
        """The collectives of the run in progress are about to be ended, before they are complete."""
        records = None if self.worker is None else self.worker.records
        if records is not None:
            records.close()

    def recorded(self) -> RecordedMoments | None:
        """Which steps there are; None: this worker has not been in the group, or nothing was recorded."""
        return None if self.records is None else self.records.moments()

    def recorded_state(self, moment: Moment) -> tuple[list[bytes], dict[str, Any]]:
        """All ranks' records of a moment, and the tensors that all had alike, packed."""
        assert self.records is not None
        records, tensors = self.records.state(moment)
        return records, pack(tensors)
