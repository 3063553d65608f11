"""The coordinator: decides on the driver, from pure functions, when workers train, validate and stop.

    setup; sanity check
    until done:
        start epoch
        until the epoch ends: train a chunk up to the next decision; validate if due; stop if asked
        end epoch
    finish

A chunk is at most about a second of work, so that Ctrl-C, time limits, early stopping and progress act at its end and
cost the workers no collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from raytrainer.driver.group import WorkerGroup
from raytrainer.driver.interrupt import Interrupt
from raytrainer.driver.state import RunState
from raytrainer.messages import EvaluationReport, FinishReport, Task, TrainReport
from raytrainer.plan import schedule

__all__ = ["Coordinator"]

_HOOK = {"validate": "validation", "test": "test", "predict": "predict"}


class Coordinator:
    """Drives one run on one group.

    Args:
        task: What the workers are given.
        group: The workers.
        state: Where to keep counters and metrics.
        emit: Calls a hook of the driver's callbacks: `emit("on_train_start")`.
        log: Gives rows (step, values) to the loggers.
        interrupt: Whether the user asked for the end.
        step_marks: Optimizer steps (multiples of each) at which a callback wants to be called.
    """

    def __init__(
        self,
        task: Task,
        group: WorkerGroup,
        state: RunState,
        emit: Callable[..., None],
        log: Callable[[list[tuple[int, dict[str, float]]]], None],
        interrupt: Interrupt,
        step_marks: Sequence[int] = (),
    ) -> None:
        self.task, self.settings, self.group = task, task.settings, group
        self.state, self.emit, self.log, self.interrupt = state, emit, log, interrupt
        self.marks = tuple(step_marks)
        self.validates = False
        self.plateau_steps: tuple[int, ...] = ()
        self.plateau_epochs = False
        self._chunk = 1
        self._fresh_metrics = False

    # ---------------------------------------------------------------- fit

    def fit(self, checkpoint: dict[str, Any] | None = None) -> FinishReport:
        """Train; return what rank 0 hands over."""
        self._setup(checkpoint)
        self.emit("on_fit_start")
        self.group.call("start_fit")
        if self.settings.limit_train_batches != 0 and not self._done():
            if checkpoint is None:
                self._sanity_check()
            self._train()
        return self._finish(trained=True)

    def _setup(self, checkpoint: dict[str, Any] | None) -> None:
        self.emit("setup", self.task.stage)
        reports = self.group.setup(self.task)
        self.state.trainer.status = "running"
        self.validates = reports[0].has_validation and self.settings.limit_val_batches != 0
        self.plateau_steps, self.plateau_epochs = reports[0].plateau_steps, reports[0].plateau_epochs
        if checkpoint is not None:
            self.group.call("restore", checkpoint)

    def _sanity_check(self) -> None:
        if not self.validates or self.settings.num_sanity_val_steps == 0:
            return
        self.state.sanity_checking = True
        self.state.trainer.stage = "sanity"
        try:
            self.emit("on_sanity_check_start")
            self._evaluate("validate", self.settings.num_sanity_val_steps)
            self.emit("on_sanity_check_end")
        finally:
            self.state.sanity_checking = False

    def _train(self) -> None:
        state = self.state
        state.trainer.stage = "train"
        starts = self.group.call("start_training")
        state.num_training_batches = _shortest([start.batches for start in starts])
        state.batch_size = starts[0].batch_size
        state.num_batches["validate"] = _longest([start.val_batches for start in starts])
        self.emit("on_train_start")
        self.clock = time.perf_counter() - state.progress.seconds
        while not self._done():
            self._epoch()
        self.emit("on_train_end")
        self.group.call("end_training")

    def _epoch(self) -> None:
        progress = self.state.progress
        self.emit("on_train_epoch_start")
        starts = self.group.call("start_epoch", progress.epoch, progress.batch)
        self.state.num_training_batches = length = _shortest([start.batches for start in starts])
        val_every = schedule.resolve_val_every(self.settings, length) if self.validates else None
        while not progress.epoch_ended:
            report = self._train_chunk(length, val_every)
            if schedule.epoch_done(progress, length, report.exhausted):
                self.group.call("step_epoch_schedulers")
                progress.epoch_ended = True
            self.emit("on_train_chunk_end", report)
            if self._validation_due(val_every):
                self._validate()
            if self._done():
                break
        if not self.state.interrupted:
            self._end_epoch()
        if progress.epoch_ended:
            progress.epoch, progress.batch, progress.epoch_ended = progress.epoch + 1, 0, False

    def _train_chunk(self, length: int | None, val_every: int | None) -> TrainReport:
        """Train up to the next decision; take up what the workers report."""
        state, progress = self.state, self.state.progress
        batches = schedule.batches_until_decision(self.settings, progress, length, val_every, self._chunk)
        stop_at = schedule.next_step_stop(self.settings, progress, (*self.marks, *self.plateau_steps))
        metrics = state.board.plain() if self._fresh_metrics else None
        self._fresh_metrics = False
        reports: list[TrainReport] = self.group.call("train", batches, stop_at, metrics)
        report = _merge(reports)
        steps_before = progress.step
        progress.batch, progress.step = report.batch, report.step
        progress.total_batches += report.batches
        progress.seconds = time.perf_counter() - self.clock
        self._chunk = schedule.chunk_batches(report.batches, report.seconds)
        state.should_stop |= report.stop
        state.interrupted |= self.interrupt.requested
        rows = state.board.step_values([r.metrics for r in reports])
        self.log([(step, {**values, "epoch": epoch}) for step, epoch, values in rows])
        for every in self.plateau_steps:
            if progress.step != steps_before and progress.step % every == 0:
                self.group.call("step_plateau", "step", progress.step, state.board.plain())
                break
        return report

    def _validation_due(self, val_every: int | None) -> bool:
        progress = self.state.progress
        if not self.validates or self.state.interrupted:
            return False
        if schedule.validation_due(self.settings, progress, val_every, progress.epoch_ended):
            return True
        # a requested stop that is honoured now is preceded by one last validation
        stops = self.state.should_stop and schedule.may_stop(self.settings, progress)
        return stops and progress.validated_at != progress.total_batches

    def _validate(self) -> None:
        self.state.trainer.stage = "validate"
        self.state.progress.validated_at = self.state.progress.total_batches
        self._evaluate("validate")
        self.state.trainer.stage = "train"

    def _end_epoch(self) -> None:
        state, progress = self.state, self.state.progress
        reports = self.group.call("end_epoch")
        values = state.board.epoch_values(reports, f"epoch {progress.epoch}")
        self._log_epoch_values(values)
        if self.plateau_epochs and progress.epoch_ended:
            self.group.call("step_plateau", "epoch", progress.epoch + 1, state.board.plain())
        self.emit("on_train_epoch_end")

    def _log_epoch_values(self, values: dict[str, float]) -> None:
        self._fresh_metrics = True
        if values:
            # the step of the batch just done, as for values logged with it
            step = max(0, self.state.progress.step - 1)
            self.log([(step, {**values, "epoch": self.state.progress.epoch})])

    def _done(self) -> bool:
        """Whether to stop training here, by the limits, by request, or by Ctrl-C."""
        state = self.state
        state.interrupted |= self.interrupt.requested
        return state.interrupted or schedule.is_done(self.settings, state.progress, state.should_stop)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, stage: str, checkpoint: dict[str, Any] | None = None) -> tuple[list[dict[str, float]], list[Any]]:
        """Validate, test or predict.

        Returns:
            Epoch metrics, and for "predict" the outputs: (loader, batch, output), in order.
        """
        self._setup(checkpoint)
        self.state.trainer.stage = stage
        values, predictions = self._evaluate(stage)
        self._finish(trained=False)
        return [values], predictions

    def _evaluate(self, stage: str, sanity: int | None = None) -> tuple[dict[str, float], list[Any]]:
        state, name = self.state, _HOOK[stage]
        starts = self.group.call("start_evaluation", stage, sanity)
        state.num_batches["sanity" if sanity is not None else stage] = _longest([s.batches for s in starts])
        self.emit(f"on_{name}_start")
        self.emit(f"on_{name}_epoch_start")
        predictions: list[Any] = []
        had_batches = [False] * self.group.size
        chunk, before, finished = 1, 0, False
        while not finished and not self.interrupt.requested:
            reports: list[EvaluationReport] = self.group.call("evaluate", chunk)
            finished = all(report.done for report in reports)
            for rank, report in enumerate(reports):
                had_batches[rank] |= report.batches > 0
                predictions += report.predictions
            if sanity is None:
                rows = state.board.step_values([report.metrics for report in reports])
                self.log([(step, {**values, "epoch": epoch}) for step, epoch, values in rows])
            done = max(report.batches for report in reports)
            chunk = schedule.chunk_batches(max(1, done - before), max(report.seconds for report in reports))
            before = done
            shown = replace(reports[0], batches=done, done=finished, predictions=[])
            self.emit("on_evaluation_chunk_end", shown)
        state.interrupted |= self.interrupt.requested
        ends = self.group.call("end_evaluation")
        values = {}
        if sanity is None:
            values = state.board.epoch_values([end.metrics for end in ends], f"on_{name}_epoch_end", had_batches)
            self._log_epoch_values(values)
        self.emit(f"on_{name}_epoch_end")
        self.emit(f"on_{name}_end")
        return values, sorted(predictions, key=lambda item: item[:2])

    # ---------------------------------------------------------------- end

    def _finish(self, trained: bool) -> FinishReport:
        if trained:
            self.group.call("end_fit")
        reports: list[FinishReport] = self.group.call("finish", trained)
        self.state.trainer.status = "interrupted" if self.state.interrupted else "finished"
        return reports[0]


def _merge(reports: Sequence[TrainReport]) -> TrainReport:
    """One report for all workers: the slowest time, any request to stop."""
    first = reports[0]
    return replace(
        first,
        seconds=max(r.seconds for r in reports),
        data_seconds=max(r.data_seconds for r in reports),
        exhausted=any(r.exhausted for r in reports),
        stop=any(r.stop for r in reports),
    )


def _shortest(lengths: Sequence[int | None]) -> int | None:
    """The batches that every worker has; None if some worker does not know."""
    known = [n for n in lengths if n is not None]
    return min(known) if len(known) == len(lengths) else None


def _longest(by_worker: Sequence[list[int | None]]) -> list[int | None]:
    """For each loader, the batches of the worker that has most."""
    return [None if None in lengths else max(n for n in lengths if n is not None) for lengths in zip(*by_worker, strict=True)]

