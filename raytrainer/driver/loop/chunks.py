"""`Chunks`: training up to the next decision, at most about a second at a time."""

from __future__ import annotations

import time

from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.reporting.journal import Journal
from raytrainer.driver.reporting.merged_counts import merged
from raytrainer.driver.saving.snapshots import Snapshots
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.messages import TrainReport
from raytrainer.plan import steps_and_epochs as schedule
from raytrainer.plan.settings import Settings
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["Chunks"]


class Chunks:
    """The chunks of one run.

    Args:
        settings: Of the run.
        state: Counters and metrics.
        journal: Where values are logged.
        snapshots: Are told when training has begun.
        interrupt: Whether the user asked for the end.
        marks: Optimizer steps (multiples of each) at which a chunk ends.

    Attributes:
        plateau_steps: Further such steps, at which a scheduler waits for a metric.
    """

    def __init__(
        self,
        settings: Settings,
        state: RunState,
        journal: Journal,
        snapshots: Snapshots,
        interrupt: Interrupt,
        marks: tuple[int, ...],
    ) -> None:
        self.settings, self.state, self.snapshots, self.interrupt = settings, state, snapshots, interrupt
        self.marks, self.plateau_steps = marks, tuple[int, ...]()
        self._journal = journal
        self._batches = 1
        self._behind = False  # workers have something to report of the batches done
        self._began = 0.0

    def begin(self) -> None:
        """Training begins, or goes on, here."""
        self._began = time.perf_counter() - self.state.progress.seconds

    def forget(self) -> None:
        """There are other workers, which have nothing to report."""
        self._behind = False

    def train(self, group: WorkerGroup, length: int | None, val_every: int | None) -> TrainReport:
        """Train up to the next decision; take up what the workers report."""
        state, progress = self.state, self.state.progress
        ahead = schedule.batches_until_decision(self.settings, progress, length, val_every, self._batches + 1)
        batches = min(ahead, self._batches)
        stop_at = schedule.next_step_stop(self.settings, progress, (*self.marks, *self.plateau_steps))
        metrics = self._journal.take_news()
        # On a GPU a report need not wait for its chunk's last batch: its time is part of the next chunk's.
        left_over, self._behind = self._behind, False
        with state.clock.phase("training"):
            reports: list[TrainReport] = group.call(Worker.train, batches, stop_at, metrics, ahead > batches)
        report = merged(reports)
        self._behind = report.behind
        state.clock.chunk(report.seconds, report.data_seconds)
        steps_before = progress.step
        progress.batch, progress.step = report.batch, report.step
        state.skipped_steps = report.skipped_steps
        progress.total_batches += report.batches
        progress.seconds = time.perf_counter() - self._began
        self._batches = schedule.chunk_batches(report.batches + left_over - report.behind, report.seconds)
        self.snapshots.trained()
        state.should_stop |= report.stop
        state.interrupted |= self.interrupt.requested
        self._journal.steps("train", [r.metrics for r in reports])
        for every in self.plateau_steps:
            if progress.step != steps_before and progress.step % every == 0:
                group.call(Worker.step_plateau, "step", progress.step, state.board.plain())
                break
        return report

    def catch_up(self, group: WorkerGroup, failed: bool = False) -> None:
        """Take up what the latest chunk has left for the next one, where something else comes first.

        If the run has `failed`, take up all that has been logged before the batch that failed.
        """
        if self._behind or failed:
            self._behind = False
            with self.state.clock.phase("training"):
                reports = group.call(Worker.report_steps, failed)
            self._journal.steps("train", reports)
