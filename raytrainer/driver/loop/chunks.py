"""`Chunks`: training up to the next decision, at most about a second at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence

from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.reporting.journal import Journal
from raytrainer.driver.reporting.merged_counts import merged, shortest
from raytrainer.driver.saving.capture_restore import RunCapture, count_up
from raytrainer.driver.saving.snapshots import Snapshots
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.messages import EvaluationReport, TrainReport
from raytrainer.plan import steps_and_epochs as schedule
from raytrainer.plan.folding import few
from raytrainer.plan.settings import Settings
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["Chunks"]

log = logging.getLogger("raytrainer")

#: Batches of a chunk whose steps are recorded: each record has the rows logged since the chunk began.
MOST_RECORDED = 32

#: Of chunks, over all runs of this process: workers outlive a run, and know by it which chunk another one is at.
_NUMBERS = itertools.count(1)


class Chunks:
    """The chunks of one run.

    Args:
        settings: Of the run.
        state: Counters and metrics.
        journal: Where values are logged.
        capture: Remembers with what each begins.
        snapshots: Are told when training has begun.
        interrupt: Whether the user asked for the end.
        marks: Optimizer steps (multiples of each) at which a chunk ends.

    Attributes:
        recorded: What workers had to report of a chunk in which some were lost, once: up to where all go on from.
        validated: What they have reported of the first chunk of a validation, which has come with one of training. It
            is to be ended, whatever has been asked for meanwhile.
    """

    def __init__(
        self,
        settings: Settings,
        state: RunState,
        journal: Journal,
        capture: RunCapture,
        snapshots: Snapshots,
        interrupt: Interrupt,
        marks: Sequence[int],
    ) -> None:
        self.settings, self.state, self.snapshots, self.interrupt = settings, state, snapshots, interrupt
        self.marks, self._capture = marks, capture
        self.recorded: list[TrainReport] | None = None
        self.validated: list[EvaluationReport] = []
        self._validates = 0  # batches of a validation that the chunk in progress is to begin
        self._journal = journal
        self._batches = 1
        self._behind = False  # workers have something to report of the batches done
        self._began: float | None = None
        self._told = self._told_of_rest = False

    @property
    def batch(self) -> int:
        """Batches of the epoch that workers have done."""
        return self.recorded[0].batch if self.recorded else self.state.progress.batch

    def begin(self) -> None:
        """Training begins, or goes on after workers were lost, here. Their replacement took time of this `fit`, too."""
        if self._began is None:
            self._began = time.perf_counter()
        self.state.progress.seconds = time.perf_counter() - self._began

    def forget(self) -> None:
        """There are other workers, which have nothing to report."""
        self._behind, self.validated = False, []

    def begun(self) -> list[EvaluationReport]:
        """Of a validation that is ended now; nothing: it has not begun."""
        begun, self.validated = self.validated, []
        return begun

    def train(
        self,
        group: WorkerGroup,
        length: int | None,
        val_every: int | None,
        plateau_marks: tuple[int, ...] = (),
        first: int = 0,
    ) -> TrainReport:
        """Train up to the next decision; take up what the workers report.

        `plateau_marks` are further multiples of optimizer steps at which to look. `first` are batches of the first
        chunk of a validation which nobody sees begin: where one follows, it is asked for in the same message. 0: others
        see it.
        """
        state, progress = self.state, self.state.progress
        marks = (*self.marks, *self.snapshots.step_marks, *plateau_marks)
        ahead = schedule.batches_until_decision(self.settings, progress, length, val_every, self._batches + 1)
        batches = min(ahead, self._batches, MOST_RECORDED if self.snapshots.recorded else ahead)
        stop_at = schedule.next_step_stop(self.settings, progress, marks)
        # On a GPU a report need not wait for its chunk's last batch: its time is part of the next chunk's.
        left_over, self._behind, self._validates = self._behind, False, 0
        brief = 2 * batches <= self._batches  # both together, so they are to be heard of as soon as others
        if first and brief and batches == ahead and not self.snapshots.recorded and not self.interrupt.requested:
            follows = schedule.validation_follows(self.settings, progress, batches, length, val_every)
            self._validates = first if follows else 0
        with state.clock.phase("training"):
            more, chunk, votes = ahead > batches, next(_NUMBERS), self._vote_every
            reports, self.recorded = self.recorded, None
            if reports is None:
                self._capture.begin_chunk(group, chunk)
                news = state.news()
                reports = group.call(Worker.train, batches, stop_at, news, more, chunk, votes, self._validates)
        report, self._validates = merged(reports), 0
        self.validated = [each.validation for each in reports if each.validation is not None]
        if self.validated:
            state.clock.move("training", "validating", max(each.seconds for each in self.validated))
        if self.snapshots.recorded and not all(each.records for each in reports):
            self.snapshots.recorded = False
            log.warning("From now on each step's state is copied to the driver, as not all workers can record it.")
        leaves = [each.leaves for each in reports]
        if any(leaves):
            self._warn_of_rest(leaves, report.batch)
        self._behind = report.behind
        state.clock.chunk(report.seconds, report.data_seconds)
        progress.batch, progress.step, progress.row = report.batch, report.step, report.row
        state.skipped_steps = report.skipped_steps
        progress.total_batches += report.batches
        self.begin()
        self._batches = schedule.chunk_batches(report.batches + left_over - report.behind, report.seconds)
        self.snapshots.trained()
        state.should_stop |= report.stop
        self._say_whether_stop_waits()
        state.interrupted |= self.interrupt.requested
        self._journal.steps("train", [r.metrics for r in reports])
        return report

    def common_length(self, lengths: Sequence[int | None]) -> int | None:
        """The batches of an epoch that every worker has; None if some worker does not know. Tells who has more."""
        common = shortest(lengths)
        if common is not None and (leaves := [length != common for length in lengths]) and any(leaves):
            self._warn_of_rest(leaves, common)
        return common

    def _warn_of_rest(self, leaves: Sequence[bool], batches: int) -> None:
        if self._told_of_rest:
            return
        self._told_of_rest = True
        ended, leave = ([rank for rank, more in enumerate(leaves) if more is wanted] for wanted in (False, True))
        log.warning(
            "Epoch %d ends for all workers after %d batches, where the loader of %s comes to its end; that of %s has "
            "more, which is not trained on. So that no more than a batch is left, deal a stream out sample by sample, "
            "rather than file by file: part, parts = rt.data_part(); itertools.islice(samples, part, None, parts).",
            self.state.progress.epoch, batches, _ranks(ended), _ranks(leave),
        )  # fmt: skip

    @property
    def _vote_every(self) -> int:
        """Batches of 0.04 s: what a vote decides acts after twice as many, so in less than 0.1 s or two batches."""
        return max(1, self._batches // 25)

    def _say_whether_stop_waits(self) -> None:
        settings, progress = self.settings, self.state.progress
        if self._told or not self.state.should_stop or schedule.may_stop(settings, progress):
            return
        self._told = True
        steps = settings.min_steps is not None
        minimum = f"min_steps={settings.min_steps}" if steps else f"min_epochs={settings.min_epochs}"
        log.info(
            "Asked to stop at step %d, in epoch %d; %s comes first. Trainer(%s=0) stops at once.",
            progress.step, progress.epoch, minimum, "min_steps" if steps else "min_epochs",
        )  # fmt: skip

    def say_why_no_more(self) -> None:
        """Log it if `max_time` has ended training, or if there was nothing left to train."""
        progress, settings = self.state.progress, self.settings
        if self.state.interrupted or settings.limit_train_batches == 0:
            return
        if schedule.out_of_time(settings, progress):
            log.info(
                "max_time is over, after %.1f s of training in this fit: step %d, epoch %d. "
                'fit(..., ckpt_path="last") goes on from the newest checkpoint, and has as much time again.',
                progress.seconds, progress.step, progress.epoch,
            )  # fmt: skip
        elif progress.seconds == 0.0 and schedule.is_done(settings, progress, False):
            limits = [f"{name}={limit}" for name in ("max_epochs", "max_steps")
                      if (limit := getattr(settings, name)) is not None]  # fmt: skip
            log.info(
                "Nothing is left to train at step %d, epoch %d: %s.", progress.step, progress.epoch, ", ".join(limits)
            )

    def catch_up(self, group: WorkerGroup, failed: bool = False) -> None:
        """Take up what the latest chunk has left for the next one, where something else comes first.

        If the run has `failed`, take up all that has been logged, and count all that was done, before that batch.
        """
        if self._behind or failed:
            self._behind = False
            with self.state.clock.phase("training"):
                unheard = bool(self._validates)  # what came with a validation that has failed on some worker
                reports = group.call(Worker.report_steps, failed, unheard)
            self._journal.steps("train", reports)
        if failed and (group.in_process or self._validates):  # else the chunk that has failed counts for nothing
            count_up(group, self.state)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {few(list(map(str, ranks)), 5)}"
