"""`EpochEnd`: what happens once an epoch's batches are over. It happens once: a resumed run repeats and omits nothing.

In this order: schedulers that count epochs; values over all workers; validation, if one is due; the workers' last
hooks; values again, with what these have logged; schedulers that wait for a metric; callbacks, of which those that save
come last.
"""

from __future__ import annotations

import logging
from functools import partial

from raytrainer.driver.loop.object_values import ObjectValues
from raytrainer.driver.loop.plateaus import Plateaus
from raytrainer.driver.loop.replica_check import ReplicaCheck
from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.reporting.journal import Journal
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.metric_messages import MetricReport, Reduced
from raytrainer.task import Task
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["EpochEnd"]

log = logging.getLogger("raytrainer")


class EpochEnd:
    """The ends of one run's epochs.

    Args:
        task: Has the module.
        state: Counters and metrics.
        services: Callbacks.
        journal: Where values are logged.
        plateaus: Schedulers that wait for a metric.
        replicas: Whether workers still have the same weights.
    """

    def __init__(
        self,
        task: Task,
        state: RunState,
        services: RunServices,
        journal: Journal,
        plateaus: Plateaus,
        replicas: ReplicaCheck,
    ) -> None:
        self._state, self._services, self._journal = state, services, journal
        self._plateaus, self._replicas, self._automatic = plateaus, replicas, task.module.automatic_optimization
        self._so_far: Reduced | None = None  # values of the epoch in progress, once its batches are over
        self._began = 0  # batches when it began
        self._said = False

    def forget(self) -> None:
        """Another epoch begins, or other workers go on."""
        self._so_far = None
        self._began = self._state.progress.total_batches

    def sum_up(self, group: WorkerGroup, step_schedulers: bool) -> None:
        """Take up the epoch's values over all workers, before those look at them who see the epoch's end."""
        state = self._state
        state.catch_up()
        reports: list[MetricReport] = group.call(Worker.end_batches, step_schedulers)
        state.should_stop |= any(report.stop for report in reports)
        self._journal.steps("train", reports)
        self._objects = ObjectValues(group)
        what = f"epoch {state.progress.epoch}"
        self._so_far = self._journal.reduce("train", reports, what, compute=self._objects.so_far)

    def finish(self, group: WorkerGroup, validates: bool) -> None:
        """The hooks; also where a run ends within an epoch, which another one may go on with."""
        state, progress = self._state, self._state.progress
        if self._so_far is None:
            self.sum_up(group, False)
        end = self._so_far, progress.epoch_ended, state.should_stop
        reports: list[MetricReport] = group.call(Worker.end_epoch, *end)
        self._replicas.after_epoch(group, progress.epoch)
        state.should_stop |= any(report.stop for report in reports)
        self._journal.replay(reports[0].calls)
        compute = partial(self._objects.at_end, epoch_ended=progress.epoch_ended)
        values = self._journal.reduce("train", reports, f"epoch {progress.epoch}", compute=compute)
        self._journal.epoch("epoch", values)
        state.board.tell(values)  # the workers, of what the last hooks have logged; of an evaluation's they know
        if not any(report.trained for report in reports):
            self._say_if_idle()
        if progress.epoch_ended:
            self._plateaus.after_epoch(group, validates)
        state.closing = True
        try:
            self._services.emit("on_train_epoch_end")
        finally:
            state.closing = False

    def _say_if_idle(self) -> None:
        """Warn, once, of an epoch in which no worker has trained: steps that return None skip their batches."""
        progress = self._state.progress
        if self._said or not progress.epoch_ended or progress.total_batches == self._began:
            return
        self._said = True
        automatic = "training_step returned None for each of them (is there a `return loss`?), or they were None"
        why = automatic if self._automatic else "no optimizer of self.optimizers() was stepped"
        log.warning("Epoch %d trained on none of its batches: %s.", progress.epoch, why)
