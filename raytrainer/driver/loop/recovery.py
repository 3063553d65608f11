"""`WorkerRecovery`: other workers for a `fit` that goes on, after some were lost.

What they get back (weights, counters, metrics) is put together in `driver/saving/capture_restore.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.saving.beginning import Beginning
from raytrainer.driver.saving.capture_restore import RunCapture
from raytrainer.driver.saving.recorded_state import RecordedState
from raytrainer.driver.saving.snapshots import Snapshots
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import ResourceError, StateLostError, WorkerLostError
from raytrainer.messages import TrainReport
from raytrainer.plan.recoveries import Recovery
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import Progress
from raytrainer.view.run_state import RunState

__all__ = ["WorkerRecovery"]

#: Seconds of training after which spares="auto" means one: a run that is shorter is soon repeated.
AUTO_AFTER = 20.0

#: Hooks of driver callbacks that are called once before training, in order.
_BEGINNING = ("setup", "on_fit_start", "on_train_start")

log = logging.getLogger("raytrainer")


class WorkerRecovery:
    """Replaces the workers of one `fit`.

    Args:
        state: Counters, which go back to where training goes on.
        services: Have new workers, and the callbacks to put back.
        capture: Takes states up.
        snapshots: Has the newest states.
        settings: How often workers may be lost, and how many spare ones wait.
        lost: What has been lost before the first workers were there, and when.
    """

    def __init__(
        self, state: RunState, services: RunServices, capture: RunCapture, snapshots: Snapshots, settings: Settings,
        lost: Sequence[tuple[WorkerLostError, float]] = (),
    ) -> None:  # fmt: skip
        self._state, self._services, self._capture, self._snapshots = state, services, capture, snapshots
        self._allowed = settings.max_failures - len(lost) if snapshots.enabled else 0
        self._spares = settings.spares
        self._trains_since: float | None = None
        self._callbacks_after: dict[str, dict[str, Any]] = {}  # hooks that are called once
        self._at_beginning = False  # training is to begin again
        self._failed: tuple[WorkerLostError | StateLostError, float, Progress] | None = None  # until training goes on
        if lost:
            self._failed = *lost[0], Progress()
        self._recorded: RecordedState | None = None  # what training has gone on from, until there is a snapshot of it
        self._source = "the run's beginning"  # where training goes on

    def allowed(self) -> bool:
        """Whether to recover from one more failure."""
        self._allowed -= 1
        return self._allowed >= 0

    def remember_callbacks(self, hook: str) -> None:
        """No recovery calls that hook again: what callbacks have now, they have when the run comes there again."""
        if self._snapshots.enabled:
            self._callbacks_after[hook] = self._services.callback_states()

    def put_callbacks_back(self, hook: str) -> None:
        """The run comes to where it called that hook."""
        if hook == "on_train_end" or (hook == "on_train_start" and self._at_beginning):
            self._services.restore_callbacks(self._callbacks_after[hook])

    def regroup(self, error: WorkerLostError | StateLostError, group: WorkerGroup) -> WorkerGroup:
        """Workers to go on with.

        Args:
            error: What has happened.
            group: Those that are left of it go on, at the first attempt; at further ones all workers are new.
        """
        first = self._failed is None
        if first:  # at a further failure the time since the first one counts
            self._failed = error, time.perf_counter(), self._state.progress
        log.warning("%s Recovering.", error)
        try:
            return self._services.regroup(group if first and isinstance(error, WorkerLostError) else None)
        except ResourceError as not_had:
            raise not_had from error

    def go_back(
        self, original: Beginning | None, group: WorkerGroup
    ) -> tuple[Beginning | None, list[TrainReport] | None]:
        """Put the driver where training goes on; return the state to restore, None for the beginning.

        Args:
            original: The checkpoint that the `fit` began with.
            group: Who goes on.

        Returns:
            It; and what workers have reported since the driver's part of it, where they have recorded that.
        """
        state = self._state
        recorded = self._capture.recorded(group) or self._recorded
        if recorded is not None and len(recorded.reports) != group.size:
            recorded = None  # its batches are those of as many workers, each with its part of the data
        self._recorded = recorded
        snapshot = self._snapshots.latest() if recorded is None else recorded.state
        self._source = "the run's beginning" if snapshot is None else "a snapshot"
        if snapshot is None:
            snapshot = self._snapshots.newest_checkpoint()
            self._source = self._source if snapshot is None else "a checkpoint"
        beginning = original if snapshot is None else Beginning(snapshot, once=True)
        if recorded is not None:
            self._source = "what each worker had recorded"
            self._snapshots.owe()
        if beginning is not None:
            self._capture.restore(beginning.state)
            state.should_stop = beginning.state.get("should_stop", False)
        else:
            state.progress = Progress()
            state.board.restore({})
            state.plateaus.clear()
            state.should_stop = False
        self._at_beginning = snapshot is None
        if snapshot is None:
            called = [hook for hook in reversed(_BEGINNING) if hook in self._callbacks_after]
            callbacks = self._callbacks_after[called[0]] if called else {}
        else:
            callbacks = snapshot.get("callbacks") or {}
        self._services.restore_callbacks(callbacks)
        return beginning, None if recorded is None else recorded.reports

    def note(self, group: WorkerGroup) -> None:
        """Training begins, or goes on: say what was lost, if anything was, and how long it took until here."""
        self._trains_since = self._trains_since or time.perf_counter()
        if self._failed is None:
            return
        error, began, lost_at = self._failed
        self._failed = None
        step, batches = self._state.progress.step, self._state.progress.total_batches
        if self._recorded is not None:
            step, batches = self._recorded.reports[0].step, batches + self._recorded.reports[0].batches
        replayed = max(0, lost_at.total_batches - batches)
        seconds = time.perf_counter() - began
        who = group.continuity
        counts = max(lost_at.step, step), step, replayed, seconds, group.size, who.kept, who.spares
        recovery = Recovery(str(error), *counts, self._source)
        self._state.recoveries.append(recovery)
        log.warning("Recovered. %s", recovery)

    def prepare(self, group: WorkerGroup) -> None:
        """Between chunks: have as many spare workers wait as are asked for, as long as one may be needed."""
        self._recorded = self._recorded if self._snapshots.owed else None
        if self._allowed <= 0 or self._trains_since is None:
            return
        if not isinstance(self._spares, str):
            group.keep_spares(self._spares)
        elif time.perf_counter() - self._trains_since >= AUTO_AFTER:
            group.keep_spares(1)
