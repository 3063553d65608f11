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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raytrainer.data.slicing import join_parts
from raytrainer.driver.checkpoints import Captured
from raytrainer.driver.group import WorkerGroup
from raytrainer.driver.interrupt import Interrupt
from raytrainer.driver.snapshots import Snapshots
from raytrainer.driver.state import RunState
from raytrainer.errors import WorkerLostError
from raytrainer.messages import EvaluationReport, FinishReport, LogCall, MetricReport, MetricSpec, Task, TrainReport
from raytrainer.plan import schedule
from raytrainer.plan.recovery import Recovery
from raytrainer.plan.schedule import Progress
from raytrainer.plan.strategies import effective_batch

__all__ = ["Coordinator", "Host"]

log = logging.getLogger("raytrainer")

_HOOK = {"validate": "validation", "test": "test", "predict": "predict"}
Rows = list[tuple[int, dict[str, float]]]


class Host(Protocol):
    """What the coordinator asks of whoever started it (the Trainer)."""

    def emit(self, hook: str, *args: Any) -> None:
        """Call a hook of the driver's callbacks."""

    def log_rows(self, rows: Rows) -> None:
        """Give rows (step, values) to the loggers."""

    def replay(self, calls: Sequence[LogCall], step: int) -> None:
        """Make the calls of `self.logger` that rank 0 has kept; `step` is that of those without one."""

    def callback_states(self) -> dict[str, Any]:
        """States of the driver's callbacks."""

    def restore_callbacks(self, states: dict[str, Any]) -> None:
        """Put them back."""

    def regroup(self) -> WorkerGroup:
        """New workers, in place of the group's."""

    def can_grow(self, group: WorkerGroup) -> bool:
        """Whether an elastic run could have more workers than `group` has."""


@dataclass
class Hosted:
    """A `Host` made of functions."""

    emit: Callable[..., None]
    log_rows: Callable[[Rows], None]
    replay: Callable[[Sequence[LogCall], int], None]
    callback_states: Callable[[], dict[str, Any]]
    restore_callbacks: Callable[[dict[str, Any]], None]
    regroup: Callable[[], WorkerGroup]
    can_grow: Callable[[WorkerGroup], bool]


class _MoreWorkers(Exception):
    """An elastic run can have more workers now."""


class Coordinator:
    """Drives one run.

    Args:
        task: What the workers are given.
        group: The workers to begin with.
        state: Where to keep counters and metrics.
        host: Callbacks, loggers and new workers.
        interrupt: Whether the user asked for the end.
        step_marks: Optimizer steps (multiples of each) at which a callback wants to be called.
    """

    def __init__(
        self,
        task: Task,
        group: WorkerGroup,
        state: RunState,
        host: Host,
        interrupt: Interrupt,
        step_marks: Sequence[int] = (),
    ) -> None:
        self.task, self.settings, self.group = task, task.settings, group
        self.state, self.host, self.interrupt = state, host, interrupt
        state.clock.ray_data = "train" in task.datasets
        self.snapshots = Snapshots(self.settings, enabled=not group.in_process and task.stage == "fit")
        self.marks = (*step_marks, *self.snapshots.step_marks)
        self.validates = False
        self.plateau_steps: tuple[int, ...] = ()
        self.plateau_epochs = False
        self._chunk = 1
        self._clock = 0.0
        self._parts = 1  # batches that the group reads at the same time
        self._fresh_metrics = False
        self._closing = False  # the epoch is over for the workers; callbacks are being told
        self._emitted: set[str] = set()
        self._callbacks_before = host.callback_states()
        self._failures = 0
        self._grown_in = -1  # the epoch that began with an attempt to get more workers
        self._failed: tuple[WorkerLostError, float, Progress] | None = None  # until training goes on
        self._logged: dict[str, int] = {}  # how far each kind of row has been logged, so that replays log nothing twice

    # ---------------------------------------------------------------- fit

    def fit(self, checkpoint: dict[str, Any] | None = None) -> FinishReport:
        """Train, over as many failures as are allowed; return what rank 0 hands over."""
        resumed, lost = checkpoint, None
        while True:
            try:
                self.state.clock.switch("starting")
                if lost is not None:  # in here, since workers may be lost while others are being replaced
                    resumed, lost = self._recover(lost, checkpoint), None
                return self._attempt(resumed)
            except WorkerLostError as error:
                self.group.abort()
                self._failures += 1
                if not self.snapshots.enabled or self._failures > self.settings.max_failures:
                    raise
                lost = error
            except _MoreWorkers:
                self.state.clock.switch("starting")
                resumed = self._grow()

    def _attempt(self, checkpoint: dict[str, Any] | None) -> FinishReport:
        self._setup(checkpoint)
        self._emit_once("on_fit_start")
        self.group.call("start_fit")
        unfinished = self.state.progress.epoch_ended  # a checkpoint from between an epoch's last batch and its end
        if self.settings.limit_train_batches != 0 and (unfinished or not self._done()):
            if checkpoint is None:
                self._sanity_check()
            self._start_training()
            if unfinished:
                self._epoch()
            while not self._done():
                if self._may_grow():
                    raise _MoreWorkers
                self._epoch()
            self._emit_once("on_train_end")
            self.group.call("end_training", self.state.interrupted)
        self.group.call("end_fit")
        return self._finish(trained=True)

    def _may_grow(self) -> bool:
        """Once an epoch: what looks free may be taken by somebody else meanwhile."""
        progress = self.state.progress
        return bool(progress.total_batches and progress.epoch != self._grown_in and self.host.can_grow(self.group))

    def _setup(self, checkpoint: dict[str, Any] | None) -> None:
        self._emit_once("setup", self.task.stage)
        self.task.resuming = checkpoint is not None
        reports = self.group.setup(self.task)
        if checkpoint is not None:
            reports = self.group.call("restore", checkpoint)
        self.state.trainer.status = "running"
        self.state.world_size = self.group.size
        self._parts = reports[0].parts
        self.validates = reports[0].has_validation and self.settings.limit_val_batches != 0
        self.plateau_steps, self.plateau_epochs = reports[0].plateau_steps, reports[0].plateau_epochs
        if checkpoint is not None and self.task.stage == "fit":
            before = checkpoint.get("parts") or checkpoint.get("world_size", self._parts)
            schedule.rescale(self.state.progress, before, self._parts)

    def _emit_once(self, hook: str, *args: Any) -> None:
        """For hooks of a whole run, which a recovery must not repeat."""
        if hook not in self._emitted:
            self._emitted.add(hook)
            self.host.emit(hook, *args)

    def _sanity_check(self) -> None:
        if not self.validates or self.settings.num_sanity_val_steps == 0:
            return
        state = self.state
        state.sanity_checking = True
        state.trainer.stage = "sanity"
        try:
            with state.clock.phase("validating"):
                self.host.emit("on_sanity_check_start")
                self._evaluate("validate", self.settings.num_sanity_val_steps)
                self.host.emit("on_sanity_check_end")
        finally:
            state.sanity_checking = False

    def _start_training(self) -> None:
        state = self.state
        state.trainer.stage = "train"
        starts = self.group.call("start_training")
        state.num_training_batches = _shortest([start.batches for start in starts])
        state.batch_size = starts[0].batch_size
        unit = {"ddp2": "node", "dp": "job"}.get(self.settings.strategy, "worker")
        accumulate = self.settings.accumulated(state.progress.epoch)
        size = effective_batch(state.batch_size, self._parts, accumulate, unit)
        if size is not None and self.group.size > 1:
            log.info("%s", size)
        state.num_batches["validate"] = _longest([start.val_batches for start in starts])
        self._emit_once("on_train_start")
        self._clock = time.perf_counter() - state.progress.seconds
        self.snapshots.restart(state.progress.step)
        self._note_recovery()
        state.clock.switch("other")

    def _epoch(self) -> None:
        progress = self.state.progress
        self.host.emit("on_train_epoch_start")
        starts = self.group.call("start_epoch", progress.epoch, progress.batch, progress.offset)
        self.state.num_training_batches = length = _shortest([start.batches for start in starts])
        val_every = schedule.resolve_val_every(self.settings, length) if self.validates else None
        if self._validation_due(val_every):  # the run goes on from a checkpoint made right before it
            self._validate()
        while not progress.epoch_ended and not self._done():
            report = self._train_chunk(length, val_every)
            if schedule.epoch_done(progress, length, report.exhausted):
                self.group.call("step_epoch_schedulers")
                progress.epoch_ended = True
            self.host.emit("on_train_chunk_end", report)
            if self._validation_due(val_every):
                self._validate()
            self._snapshot_if_due()
        if not self.state.interrupted:
            self._end_epoch()
        if progress.epoch_ended:
            progress.next_epoch()

    def _train_chunk(self, length: int | None, val_every: int | None) -> TrainReport:
        """Train up to the next decision; take up what the workers report."""
        state, progress = self.state, self.state.progress
        batches = schedule.batches_until_decision(self.settings, progress, length, val_every, self._chunk)
        stop_at = schedule.next_step_stop(self.settings, progress, (*self.marks, *self.plateau_steps))
        metrics = state.board.plain() if self._fresh_metrics else None
        self._fresh_metrics = False
        with state.clock.phase("training"):
            reports: list[TrainReport] = self.group.call("train", batches, stop_at, metrics)
        report = _merge(reports)
        state.clock.chunk(report.seconds, report.data_seconds)
        steps_before = progress.step
        progress.batch, progress.step = report.batch, report.step
        state.skipped_steps = report.skipped_steps
        progress.total_batches += report.batches
        progress.seconds = time.perf_counter() - self._clock
        self._chunk = schedule.chunk_batches(report.batches, report.seconds)
        state.should_stop |= report.stop
        state.interrupted |= self.interrupt.requested
        self._log_steps("train", [r.metrics for r in reports])
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
        with self.state.clock.phase("validating"):
            self._evaluate("validate")
        self.state.trainer.stage = "train"

    def _end_epoch(self) -> None:
        state, progress = self.state, self.state.progress
        reports = self.group.call("end_epoch")
        self._replay(reports[0].calls)
        self._log_epoch("epoch", state.board.epoch_values(reports, f"epoch {progress.epoch}", compute=self._compute))
        if self.plateau_epochs and progress.epoch_ended:
            self.group.call("step_plateau", "epoch", progress.epoch + 1, state.board.plain())
        self._closing = True
        try:
            self.host.emit("on_train_epoch_end")
        finally:
            self._closing = False

    def _done(self) -> bool:
        """Whether to stop training here, by the limits, by request, or by Ctrl-C."""
        state = self.state
        state.interrupted |= self.interrupt.requested
        return state.interrupted or schedule.is_done(self.settings, state.progress, state.should_stop)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, stage: str, checkpoint: dict[str, Any] | None = None) -> tuple[dict[str, float], list[Any]]:
        """Validate, test or predict.

        Returns:
            Epoch metrics, and for "predict" the outputs: (loader, batch, output), in order.
        """
        self._setup(checkpoint)
        self.state.trainer.stage = stage
        values, predictions = self._evaluate(stage)
        self._finish(trained=False)
        return values, predictions

    def _evaluate(self, stage: str, sanity: int | None = None) -> tuple[dict[str, float], list[Any]]:
        state, name = self.state, _HOOK[stage]
        starts = self.group.call("start_evaluation", stage, sanity)
        state.num_batches["sanity" if sanity is not None else stage] = _longest([s.batches for s in starts])
        self.host.emit(f"on_{name}_start")
        self.host.emit(f"on_{name}_epoch_start")
        predictions: list[Any] = []
        chunk, before, finished = 1, 0, False
        while not finished and not self.interrupt.requested:
            reports: list[EvaluationReport] = self.group.call("evaluate", chunk)
            finished = all(report.done for report in reports)
            for report in reports:
                predictions += report.predictions
            if sanity is None:
                self._log_steps(stage, [report.metrics for report in reports])
            else:
                self._replay(reports[0].metrics.calls)
            done = max(report.batches for report in reports)
            chunk = schedule.chunk_batches(max(1, done - before), max(report.seconds for report in reports))
            before = done
            shown = replace(reports[0], batches=done, done=finished, predictions=[])
            self.host.emit("on_evaluation_chunk_end", shown)
        state.interrupted |= self.interrupt.requested
        ends = self.group.call("end_evaluation")
        self._replay(ends[0].metrics.calls)
        if not finished:
            return {}, []  # interrupted: nobody must take half an evaluation for a whole one
        values = {}
        if sanity is None:
            batches = [end.by_loader for end in ends]
            reported = [end.metrics for end in ends]
            values = state.board.epoch_values(reported, f"on_{name}_epoch_end", batches, self._compute)
            self._log_epoch(stage, values)
        self.host.emit(f"on_{name}_epoch_end")
        self.host.emit(f"on_{name}_end")
        return values, _in_order(predictions)

    # ---------------------------------------------------------------- logging

    def _compute(self, specs: list[MetricSpec]) -> dict[str, float]:
        """Values of metric objects over all workers."""
        values: dict[str, float] = self.group.call("compute_metrics", specs)[0]
        return values

    def _log_steps(self, kind: str, reports: Sequence[MetricReport]) -> None:
        rows = self.state.board.step_values(reports)
        logged = self._logged.get(kind, -1)
        fresh = [(step, {**values, "epoch": epoch}) for step, epoch, values in rows if step > logged]
        if fresh:
            self._logged[kind] = fresh[-1][0]
            self.host.log_rows(fresh)
        self._replay(reports[0].calls)

    def _replay(self, calls: Sequence[LogCall]) -> None:
        if calls:
            self.host.replay(calls, max(0, self.state.progress.step - 1))

    def _log_epoch(self, kind: str, values: dict[str, float]) -> None:
        self._fresh_metrics = True
        progress = self.state.progress
        if not values or self._logged.get(f"{kind} values", -1) >= progress.total_batches > 0:
            return
        self._logged[f"{kind} values"] = progress.total_batches
        # the step of the batch just done, as for values logged with it
        self.host.log_rows([(max(0, progress.step - 1), {**values, "epoch": progress.epoch})])

    # ---------------------------------------------------------------- state

    def capture(self, weights_only: bool = False) -> Captured:
        """Have the state of the run copied aside; training may go on at once."""
        began = time.perf_counter()
        with self.state.clock.phase("saving"):
            fetch = self.group.capture(weights_only)
        captured = Captured(fetch, {} if weights_only else self._driver_state())
        if not weights_only:
            self.snapshots.take(captured, self.state.progress.step, time.perf_counter() - began)
        return captured

    def rescue(self) -> dict[str, Any] | None:
        """The newest state that can be had of a `fit` that has failed, as a checkpoint; None: there is none.

        Workers in this process still hold the state before the batch that failed. Others may be gone, or wait for each
        other for ever: of them it is the newest snapshot.
        """
        if not self.group.in_process:
            return self.snapshots.latest()
        cursor, progress = self.group.call("cursor")[0], self.state.progress
        if self.state.trainer.stage == "validate":
            progress.validated_at = -1  # is to be repeated
        if cursor is not None and not progress.epoch_ended:
            progress.total_batches += cursor[0] - progress.batch
            progress.batch, progress.step = cursor
        return self.capture().resolve()

    def _driver_state(self) -> dict[str, Any]:
        cursor = replace(self.state.progress)
        if self._closing and cursor.epoch_ended:
            cursor.next_epoch()
        return {
            "progress": vars(cursor),
            "metrics": self.state.board.plain(),
            "should_stop": self.state.should_stop,
            "callbacks": self.host.callback_states(),
            "world_size": self.group.size,
            "parts": self._parts,
            "seed": self.task.seed,
        }

    def take_up(self, checkpoint: dict[str, Any]) -> None:
        """Put the driver's counters where a checkpoint has them; `_setup` does so for the workers."""
        self.state.progress = Progress(**checkpoint["progress"])
        if checkpoint["seed"] != self.task.seed:
            if self.settings.seed is not None:
                log.warning("Going on with the checkpoint's seed %s, not %s.", checkpoint["seed"], self.settings.seed)
            self.task.seed = checkpoint["seed"]
        if self.state.progress.epoch_ended:
            self.state.board.take(checkpoint["metrics"])

    def _snapshot_if_due(self) -> None:
        progress = self.state.progress
        accumulate = self.settings.accumulated(progress.epoch)
        between_steps = progress.epoch_ended or progress.batch % accumulate == 0
        if between_steps and self.snapshots.due(progress.step):
            self.capture()

    def _recover(self, error: WorkerLostError, original: dict[str, Any] | None) -> dict[str, Any] | None:
        """Replace the lost group; return the state to go on from, None for the beginning."""
        state = self.state
        if self._failed is None:  # else an earlier one has not been recovered from yet
            self._failed = error, time.perf_counter(), state.progress
        log.warning("%s Recovering.", error)
        self.group = self.host.regroup()
        checkpoint = self.snapshots.latest() or original
        if checkpoint is not None:
            self.take_up(checkpoint)
            state.should_stop = checkpoint.get("should_stop", False)
            self.host.restore_callbacks(checkpoint.get("callbacks") or {})
        else:
            state.progress = Progress()
            state.should_stop = False
            self.host.restore_callbacks(self._callbacks_before)
        return checkpoint

    def _note_recovery(self) -> None:
        """Training goes on: say what was lost, and how long it took until here."""
        if self._failed is None:
            return
        error, began, lost_at = self._failed
        self._failed = None
        now = self.state.progress
        replayed = max(0, lost_at.total_batches - now.total_batches)
        seconds = time.perf_counter() - began
        recovery = Recovery(str(error), lost_at.step, now.step, replayed, seconds, self.group.size)
        self.state.recoveries.append(recovery)
        log.warning("Recovered. %s", recovery)

    def _grow(self) -> dict[str, Any]:
        """Go on with a larger group, from right here."""
        checkpoint = self.capture().resolve()
        before = self.group.size
        self._grown_in = self.state.progress.epoch
        self.group.abort()
        self.group = self.host.regroup()
        log.info("Epoch %d begins with %d workers instead of %d.", self.state.progress.epoch, self.group.size, before)
        return checkpoint

    # ---------------------------------------------------------------- end

    def _finish(self, trained: bool) -> FinishReport:
        reports: list[FinishReport] = self.group.call("finish", trained)
        self._replay(reports[0].calls)
        self.state.profiles = [r.profile for r in reports]
        self.state.peak_memory_bytes = [r.peak_memory_bytes for r in reports if r.peak_memory_bytes is not None]
        self.state.trainer.status = "interrupted" if self.state.interrupted else "finished"
        return reports[0]


def _merge(reports: Sequence[TrainReport]) -> TrainReport:
    """One report for all workers: the slowest time, any request to stop."""
    return replace(
        reports[0],
        seconds=max(r.seconds for r in reports),
        data_seconds=max(r.data_seconds for r in reports),
        exhausted=any(r.exhausted for r in reports),
        stop=any(r.stop for r in reports),
    )


def _in_order(predictions: Sequence[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """(loader, batch, output) sorted, where workers that split a batch have each sent a part, in order of rank."""
    parts: dict[tuple[int, int], list[Any]] = {}
    for loader, batch, output in predictions:
        parts.setdefault((loader, batch), []).append(output)
    return [(*key, outputs[0] if len(outputs) == 1 else join_parts(outputs)) for key, outputs in sorted(parts.items())]


def _shortest(lengths: Sequence[int | None]) -> int | None:
    """The batches that every worker has; None if some worker does not know."""
    known = [n for n in lengths if n is not None]
    return min(known) if len(known) == len(lengths) else None


def _longest(by_worker: Sequence[list[int | None]]) -> list[int | None]:
    """For each loader, the batches of the worker that has most."""
    longest: list[int | None] = []
    for lengths in zip(*by_worker, strict=True):
        known = [n for n in lengths if n is not None]
        longest.append(max(known) if len(known) == len(lengths) else None)
    return longest
