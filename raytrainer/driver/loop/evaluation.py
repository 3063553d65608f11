"""`Evaluation`: validate, test or predict once, in chunks, with what callbacks and loggers are told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raytrainer.callbacks.callback import Callback
from raytrainer.callbacks.early_stopping import EarlyStopping
from raytrainer.callbacks.model_checkpoint import ModelCheckpoint
from raytrainer.callbacks.progress import ProgressBar
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.loop.object_values import ObjectValues
from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.reporting.journal import Journal
from raytrainer.driver.reporting.merged_counts import in_order, longest
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.messages import EvaluationReport
from raytrainer.metric_messages import MetricReport, Reduced
from raytrainer.plan import steps_and_epochs as schedule
from raytrainer.seeding import rng_untouched
from raytrainer.view.run_state import RunState, nothing
from raytrainer.worker.evaluation_calls import HOOKS
from raytrainer.worker.hook_calls import overridden
from raytrainer.worker.worker import Worker

__all__ = ["Evaluation", "sees_it_begin"]

#: Seconds of a first chunk that may come with training, which takes no longer either: both are one silence of workers.
BRIEF = 0.5

#: Hooks of the driver's callbacks between the batches before a validation and its own; and ours, which do nothing there
#: that workers would know of.
BETWEEN = ("on_train_chunk_end", "on_validation_start", "on_validation_epoch_start")
LOOKING = {getattr(kind, hook) for kind in (ProgressBar, ModelCheckpoint, EarlyStopping) for hook in BETWEEN}


def sees_it_begin(callback: Callback) -> bool:
    """Whether a callback may act between the batches before a validation and its own."""
    own = [getattr(callback, hook) for hook in BETWEEN if overridden(callback, hook)]
    return any(getattr(hook, "__func__", hook) not in LOOKING for hook in own)


class Evaluation:
    """The evaluations of one run.

    Args:
        state: Where to keep lengths and metrics.
        services: Whose callbacks are told.
        interrupt: Whether the user asked for the end.
        journal: Where values are logged.

    Attributes:
        cut_off: Whether Ctrl-C or SIGTERM has ended the latest one before its last batch.
        unseen: Whether no callback of the driver's acts between the batches before a validation and its own.
    """

    def __init__(self, state: RunState, services: RunServices, interrupt: Interrupt, journal: Journal) -> None:
        self._state, self._services, self._interrupt, self._journal = state, services, interrupt, journal
        self.cut_off = False
        self._steady: tuple[WorkerGroup | None, str] = None, ""  # whose next evaluation of which stage starts unseen
        self._first, self._brief = 1, False  # batches of its first chunk, and whether that has taken little time
        self.unseen = False

    def first(self, group: WorkerGroup) -> int:
        """Batches that a message of training may ask for of the next validation; 0: somebody sees it begin."""
        return self._first if self.unseen and self._brief and self._steady == (group, "validate") else 0

    def run(
        self,
        group: WorkerGroup,
        stage: str,
        sanity: int | None = None,
        then: Callable[[], None] = nothing,
        begun: list[EvaluationReport] | None = None,
    ) -> tuple[Reduced, list[Any]]:
        """Evaluate everything, or as a sanity check `sanity` batches of each loader.

        `then` is called once the metrics are there, before callbacks are told. `begun`: of the first chunk, which has
        been asked for already.

        Returns:
            Epoch metrics, and the outputs asked for: (loader, batch, output), in order. Nothing if interrupted.
        """
        state, name = self._state, HOOKS[stage]
        self.cut_off = False
        if begun or (sanity is None and self._steady == (group, stage) and not self._interrupt.requested):
            self._emit_start(name)  # before the workers start, as nobody sees the difference
            begun = begun or group.call(Worker.evaluate, self._first, stage, state.news())
            starts = [report.start for report in begun if report.start is not None]
        else:
            starts = group.call(Worker.start_evaluation, stage, sanity, state.news())
        state.should_stop |= any(start.stop for start in starts)
        state.num_batches["sanity" if sanity is not None else stage] = longest([s.batches for s in starts])
        if all(start.nothing for start in starts):
            return Reduced(), []
        if not begun:
            self._emit_start(name)
        reports, predictions = self._chunks(group, stage, sanity, begun or [])
        self._steady = None, ""
        if not group.in_process and sanity is None and all(start.steady for start in starts):
            self._steady = group, stage
        self.cut_off = not reports
        state.interrupted |= self._interrupt.requested
        values, objects, counts = Reduced(), ObjectValues(group), bool(reports) and sanity is None
        if counts:
            values = self._reduce(stage, reports, compute=objects.so_far)
        if counts and all(report.quiet for report in reports):
            group.later(Worker.leave_evaluation, values)
        else:
            ends: list[EvaluationReport] = group.call(Worker.end_evaluation_epoch, values)
            self._take(stage, sanity, [end.metrics for end in ends])
            if counts:
                values = self._reduce(stage, ends, compute=objects.at_end)
            self._take(stage, sanity, group.call(Worker.end_evaluation, values, self.cut_off))
        if not reports:
            return Reduced(), []  # interrupted: nobody must take half an evaluation for a whole one
        if sanity is None:
            self._journal.epoch(stage, values)
            then()
        self._services.emit(f"on_{name}_epoch_end")
        self._services.emit(f"on_{name}_end")
        return values, in_order(predictions)

    def check_sanity(self, group: WorkerGroup, batches: int) -> None:
        """The sanity check, of so many batches (-1: all): callbacks that draw random numbers leave no trace either."""
        state = self._state
        state.sanity_checking, state.trainer.stage = True, "sanity"
        try:
            with state.clock.phase("validating"), rng_untouched():
                self._services.emit("on_sanity_check_start")
                self.run(group, "validate", batches)
                self._services.emit("on_sanity_check_end")
        finally:
            state.sanity_checking = False

    def _emit_start(self, name: str) -> None:
        self._services.emit(f"on_{name}_start")
        self._services.emit(f"on_{name}_epoch_start")

    def _reduce(self, stage: str, reports: list[EvaluationReport], **options: Any) -> Reduced:
        """The epoch's values over all workers, as they are in these reports."""
        batches, metrics = [report.by_loader for report in reports], [report.metrics for report in reports]
        return self._journal.reduce(stage, metrics, f"on_{HOOKS[stage]}_epoch_end", batches=batches, **options)

    def _chunks(
        self, group: WorkerGroup, stage: str, sanity: int | None, begun: list[EvaluationReport]
    ) -> tuple[list[EvaluationReport], list[Any]]:
        """Evaluate chunk by chunk; return the last reports, none if that did not come to its end, and predictions.

        `begun` are those of the first chunk, if that is done.
        """
        predictions: list[Any] = []
        chunk, waited_for, finished, self._brief = 1, 0, False, True
        while not finished and (begun or not self._interrupt.requested):
            reports = begun or group.call(Worker.evaluate, chunk)
            begun = []
            finished = all(report.done for report in reports)
            for report in reports:
                predictions += report.predictions
            self._take(stage, sanity, [report.metrics for report in reports])
            done = max(report.batches for report in reports)
            # a report that is `behind` does not wait for its last batch
            waited_before, waited_for = waited_for, done - any(report.behind for report in reports)
            seconds = max(report.seconds for report in reports)
            self._brief &= waited_before > 0 or seconds <= BRIEF
            known = schedule.chunk_batches(waited_for - waited_before, seconds)
            # a loader's speed says nothing of the next one's
            chunk = 1 if any(report.through for report in reports) else known
            self._first = known if len(reports[0].by_loader) == 1 else 1
            one = len(reports) == 1 and not predictions
            shown = reports[0] if one else replace(reports[0], batches=done, done=finished, predictions=[])
            self._services.emit("on_evaluation_chunk_end", shown)
        return reports if finished else [], predictions

    def _take(self, stage: str, sanity: int | None, reports: list[MetricReport]) -> None:
        """Take up what has been logged by step, and requests to stop."""
        self._state.should_stop |= any(report.stop for report in reports)
        if sanity is None:
            self._journal.steps(stage, reports)
        else:
            self._journal.replay(reports[0].calls)
