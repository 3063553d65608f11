"""The coordinator: decides on the driver, from pure functions, when workers train, validate, save and stop.

    until done, or again after a worker was lost:
        setup; sanity check; take up where a checkpoint or snapshot left off
        until done:
            start epoch
            until the epoch ends: train a chunk up to the next decision; validate if due; stop if asked
            end epoch
        finish

A chunk is at most about a second of work, so that Ctrl-C, time limits, early stopping and progress act at its end and
cost the workers no collective.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from raytrainer.driver.loop.chunks import Chunks
from raytrainer.driver.loop.epoch_end import EpochEnd
from raytrainer.driver.loop.evaluation import Evaluation
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.loop.plateaus import Plateaus
from raytrainer.driver.loop.recovery import WorkerRecovery
from raytrainer.driver.loop.replica_check import ReplicaCheck, alike
from raytrainer.driver.loop.resizing import OtherWorkers, Resizing
from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.reporting.journal import Journal
from raytrainer.driver.reporting.merged_counts import longest, shortest
from raytrainer.driver.saving.beginning import Beginning
from raytrainer.driver.saving.capture_restore import RunCapture
from raytrainer.driver.saving.checkpoint_writer import Captured
from raytrainer.driver.saving.snapshots import Snapshots
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import StateLostError, WorkerLostError
from raytrainer.messages import FinishReport
from raytrainer.metric_messages import Reduced
from raytrainer.plan import steps_and_epochs as schedule
from raytrainer.plan.strategy_settings import effective_batch
from raytrainer.task import Task
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["Coordinator"]

log = logging.getLogger("raytrainer")


class Coordinator:
    """Drives one run.

    Args:
        task: What the workers are given.
        group: The workers to begin with.
        state: Where to keep counters and metrics.
        services: Callbacks, loggers and new workers.
        interrupt: Whether the user asked for the end.
        step_marks: Optimizer steps (multiples of each) at which a callback wants to be called.
        lost: See `WorkerRecovery`.
    """

    def __init__(
        self, task: Task, group: WorkerGroup, state: RunState, services: RunServices, interrupt: Interrupt,
        step_marks: Sequence[int] = (), lost: Sequence[tuple[WorkerLostError, float]] = (),
    ) -> None:  # fmt: skip
        self.task, self.settings, self.group = task, task.settings, group
        self.state, self.services, self.interrupt = state, services, interrupt
        state.clock.ray_data = "train" in task.datasets
        self.snapshots = Snapshots(self.settings, enabled=not group.in_process and task.stage == "fit")
        self.validates = self._resumes = False  # the latter: the epoch in progress has begun before the run was resumed
        self._plateaus = Plateaus(state)
        self._journal = Journal(state, services)
        self.evaluation = Evaluation(state, services, interrupt, self._journal)
        self._capture = RunCapture(task, state, services, self.snapshots)
        self._recovery = WorkerRecovery(state, services, self._capture, self.snapshots, self.settings, lost)
        self._resizing = Resizing(self.settings, state, services, self._capture)
        self._chunks = Chunks(self.settings, state, self._journal, self._capture, self.snapshots, interrupt, step_marks)
        self._replicas = ReplicaCheck((self.settings.sharding or self.settings.ddp).check_replicas)
        self._epoch_end = EpochEnd(task, state, services, self._journal, self._plateaus, self._replicas)
        state.catch_up = self.catch_up
        self._emitted: set[str] = set()
        self.end_state: Captured | None = None  # what `save_checkpoint` saves after the fit, where it is kept

    # ---------------------------------------------------------------- fit

    def fit(self, beginning: Beginning | None = None) -> FinishReport:
        """Train, over as many failures as are allowed; return what rank 0 hands over."""
        resumed, lost, progress = beginning, None, self.state.progress
        progress.seconds = 0.0  # max_time counts this fit
        self._resumes = bool(progress.batch or progress.before or progress.epoch_ended)
        while True:
            try:
                self.state.clock.switch("starting")
                if lost is not None:  # within `try`, since more may be lost meanwhile
                    self.group = self._recovery.regroup(lost, self.group)
                    (resumed, self._chunks.recorded), lost = self._recovery.go_back(beginning, self.group), None
                    self._resumes = False  # new workers begin as they would at the first start
                return self._attempt(resumed)
            except (WorkerLostError, StateLostError) as error:  # a state is lost with the workers that had it
                if self.interrupt.terminated or not self._recovery.allowed():
                    self.group.abort()
                    raise
                lost = error
            except OtherWorkers as other:
                self.group, resumed, self._resumes = other.group, Beginning(other.state, once=True), False

    def _attempt(self, beginning: Beginning | None) -> FinishReport:
        self._setup(beginning)
        self._emit_once("on_fit_start")
        self.group.call(Worker.start_fit, self.state.progress.epoch)
        unfinished = self.state.progress.epoch_ended  # a checkpoint from between an epoch's last batch and its end
        begun = "on_train_start" in self._emitted  # and to be ended, also where workers are lost when all is trained
        if self.settings.limit_train_batches != 0 and (unfinished or begun or not self._done()):
            if beginning is None and self.validates and self.settings.num_sanity_val_steps != 0:
                self.evaluation.check_sanity(self.group, self.settings.num_sanity_val_steps)
            self._start_training()
            empty = self.state.num_training_batches == 0
            if unfinished:
                self._epoch()
            while not empty and not self._done():
                if not self._chunks.recorded:
                    self._resizing.look(self.group)
                self._epoch()
            self.services.end_if_preempted()
            self._replicas.check(self.group, self.state.progress.epoch - 1)
            self._emit_once("on_train_end")
            end = self.state.progress.epoch, self.state.interrupted, self.state.board.take_news()
            self.group.call(Worker.end_training, *end, self.state.should_stop)
        self._chunks.say_why_no_more()
        self.group.call(Worker.end_fit)
        self.end_state = self._capture.at_end(self.group)
        return self._finish(trained=True)

    def _setup(self, beginning: Beginning | None) -> None:
        self._emit_once("setup", self.task.stage)
        self._chunks.forget()
        self.task.resuming = beginning is not None
        with self.interrupt.at_once(not self.state.trainer.has_begun):
            reports = self.group.setup(self.task)
            if beginning is not None:
                reports = self.group.call(Worker.restore, beginning.state)
        self.state.trainer.status = "running"
        self.state.world_size, self.state.parts = self.group.size, reports[0].parts
        if reports[0].shape is not None:
            log.info("%s", reports[0].shape)
        self.validates = reports[0].has_validation and self.settings.limit_val_batches != 0
        self._counted_in = schedule.counted_in({} if beginning is None else beginning.state, self.state.parts)
        if beginning is not None:
            beginning.taken_up(for_good=not self.snapshots.enabled)

    def _emit_once(self, hook: str, *args: Any) -> None:
        """For hooks of a whole run, which a recovery must not repeat, unless it was in the midst of one."""
        if hook in self._emitted:
            self._recovery.put_callbacks_back(hook)
            return
        self.services.emit(hook, *args)
        self._emitted.add(hook)
        self._recovery.remember_callbacks(hook)

    def _start_training(self) -> None:
        state = self.state
        state.trainer.stage = "train"
        starts = self.group.call(Worker.start_training)
        state.should_stop |= any(start.stop for start in starts)
        self.snapshots.recorded = all(start.records for start in starts)
        state.num_training_batches = shortest([start.batches for start in starts])
        state.batch_size = starts[0].batch_size
        schedule.rescale(state.progress, self._counted_in, (state.parts, state.batch_size or 0), starts[0].divisible)
        accumulate = self.settings.accumulated(state.progress.epoch)
        size = effective_batch(state.batch_size, state.parts, accumulate, self.settings.strategy)
        if size is not None and self.group.size > 1:
            log.info("%s", size)
        state.num_batches["validate"] = longest([start.val_batches for start in starts])
        self._emit_once("on_train_start")
        self._replicas.begin(self.group, goes_on=self.task.resuming)
        self._chunks.begin()
        self.snapshots.restart(state.progress.step)
        self._recovery.note(self.group)
        self.interrupt.to_save = True
        state.clock.switch("other")

    def _epoch(self) -> None:
        progress = self.state.progress
        resumed, self._resumes = self._resumes, False
        self._epoch_end.forget()
        if not resumed:
            self.services.emit("on_train_epoch_start")
        cursor, news = (progress.epoch, self._chunks.batch, progress.before), self.state.news()
        starts = alike(self.group.call(Worker.start_epoch, *cursor, resumed, news), progress.epoch)
        self.state.should_stop |= any(start.stop for start in starts)
        self.state.batch_size = starts[0].batch_size  # its loader may be another one
        self._plateaus.wishes, self._resizing.divisible = starts[0].plateaus, all(s.divisible for s in starts)
        self.state.num_training_batches = length = self._chunks.common_length([start.batches for start in starts])
        val_every = schedule.resolve_val_every(self.settings, length, progress.shift) if self.validates else None
        if progress.before and length == 0:  # workers of before have left too few batches for these
            self._end_batches()
        if self._validation_due(val_every):  # the run goes on from a checkpoint that was made right before one
            self._validate(min(1, progress.step))
        while not progress.epoch_ended and not self._done():
            looks = self._plateaus.step_marks, self.evaluation.first(self.group)
            report = self._chunks.train(self.group, length, val_every, *looks)
            if schedule.epoch_done(progress, length, report.exhausted):
                self._end_batches()
            self.state.about_to_validate = self._validation_due(val_every)
            if not self._validation_would_be_due(val_every):
                self._plateaus.after_steps(self.group, report.steps, self.validates)
            self.services.emit("on_train_chunk_end", report)
            self.state.about_to_validate = False
            if self._validation_due(val_every):
                self._validate(report.steps)
            self._capture.snapshot_if_due(self.group)
            self._recovery.prepare(self.group)
            self._resizing.look(self.group)
        self.services.end_if_preempted()
        self.catch_up()
        if not self.state.interrupted:
            self._epoch_end.finish(self.group, self.validates)
        if progress.epoch_ended:
            progress.next_epoch()

    def _end_batches(self) -> None:
        """The epoch has no batch left."""
        self.state.progress.epoch_ended = True
        self._epoch_end.sum_up(self.group, step_schedulers=True)

    def catch_up(self, failed: bool = False) -> None:
        """See `Chunks.catch_up`."""
        self._chunks.catch_up(self.group, failed)

    def _validation_due(self, val_every: int | None) -> bool:
        return bool(self._chunks.validated) or (not self.state.interrupted and self._validation_would_be_due(val_every))

    def _validation_would_be_due(self, val_every: int | None) -> bool:
        """Whether one is due here, be it that a run that goes on from here has to do it."""
        progress = self.state.progress
        if not self.validates or self._chunks.recorded:
            return False
        if schedule.validation_due(self.settings, progress, val_every, progress.epoch_ended):
            return True
        # a requested stop that is honoured now is preceded by one last validation
        stops = self.state.should_stop and schedule.may_stop(self.settings, progress)
        return stops and progress.validated_at != progress.total_batches > 0

    def _validate(self, steps: int = 0) -> None:
        """Validate, after so many steps that have not been looked at yet."""
        self.catch_up()
        self.state.trainer.stage, before = "validate", self.state.progress.validated_at
        self.state.progress.validated_at = self.state.progress.total_batches
        with self.state.clock.phase("validating"):
            then, begun = (lambda: self._plateaus.after_steps(self.group, steps, self.validates)), self._chunks.begun()
            self.evaluation.run(self.group, "validate", then=then, begun=begun)
        self.state.trainer.stage = "train"
        if self.evaluation.cut_off:
            self.state.progress.validated_at = before

    def _done(self) -> bool:
        """Whether to stop training here, by the limits, by request, or by Ctrl-C."""
        self.state.interrupted |= self.interrupt.requested
        if self._chunks.recorded:
            return False
        return self.state.interrupted or schedule.is_done(self.settings, self.state.progress, self.state.should_stop)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, stage: str, beginning: Beginning | None = None) -> tuple[Reduced, list[Any]]:
        """Validate, test or predict.

        Returns:
            Epoch metrics, and for "predict" the outputs: (loader, batch, output), in order.
        """
        self._setup(beginning)
        self.state.trainer.stage = stage
        values, predictions = self.evaluation.run(self.group, stage)
        self._finish(trained=False)
        return values, predictions

    # ---------------------------------------------------------------- state

    def capture(self, weights_only: bool = False) -> Captured:
        """Have the state of the run copied aside; training may go on at once."""
        return self._capture.capture(self.group, weights_only)

    def rescue(self) -> dict[str, Any] | None:
        """The newest state that can be had of a `fit` that has failed, as a checkpoint; None: there is none."""
        return self._capture.rescue(self.group)

    def take_up(self, checkpoint: dict[str, Any]) -> None:
        """Put the driver's counters where a checkpoint has them; `_setup` does so for the workers."""
        self._capture.restore(checkpoint)

    def _finish(self, trained: bool) -> FinishReport:
        reports: list[FinishReport] = self.group.call(Worker.finish, trained)
        self._journal.replay(reports[0].calls)
        self.state.profiles = [r.profile for r in reports]
        self.state.peak_memory_bytes = [r.peak_memory_bytes for r in reports if r.peak_memory_bytes is not None]
        self.state.trainer.status = "interrupted" if self.state.interrupted else "finished"
        return reports[0]
