"""`Run`: one run of a Trainer, from the start of its workers to its orderly end, however it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrainer.callbacks import Callback, WorkerCallback
from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.driver.cluster.session import explain_lost
from raytrainer.driver.loop.asked_where import AskedWhere
from raytrainer.driver.loop.coordinator import Coordinator
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.loop.run_services import Rows
from raytrainer.driver.prepare.ray_datasets import prepare_datasets, release_datasets
from raytrainer.driver.reporting.logged_hyperparameters import logged_hyperparameters
from raytrainer.driver.reporting.results import write_profiles
from raytrainer.driver.reporting.run_loggers import Logs
from raytrainer.driver.saving.callback_states import own_copy, put_back, states_of, tensors_in
from raytrainer.driver.saving.checkpoint_writer import CheckpointWriter
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.ending import Ending
from raytrainer.errors import CheckpointError, StorageError, WorkerError
from raytrainer.loggers.logger import first_log_dir
from raytrainer.metric_messages import LogCall
from raytrainer.profilers import Profiler
from raytrainer.signals import shield, terminate
from raytrainer.task import Task
from raytrainer.view.run_state import RunState, nothing
from raytrainer.worker.hook_calls import overridden

__all__ = ["Run"]

log = logging.getLogger("raytrainer")


@dataclass(eq=False)
class Run:
    """What one run needs; the `RunServices` of its coordinator.

    Attributes:
        task: What the workers are given.
        state: Where the run is.
        callbacks: Those of the run, in order.
        emit: Calls a hook of the driver's callbacks.
        logs: The loggers.
        groups: Where workers come from.
        writer: Writes checkpoints.
        quiet: Whether it is a short run that finds something out, which is not talked about.
        coordinator: Drives the workers, from their start to the end of the run.
        failing: Whether callbacks are being told that the run has failed.
    """

    task: Task
    state: RunState
    callbacks: Sequence[Callback | WorkerCallback]
    emit: Callable[..., None]
    logs: Logs
    groups: GroupSupply
    writer: CheckpointWriter
    quiet: bool = False
    coordinator: Coordinator | None = field(default=None, init=False)
    failing: bool = field(default=False, init=False)
    _held: list[WorkerGroup] = field(default_factory=list, init=False)  # to be given back
    _impatient: bool = field(default=False, init=False)
    _interrupt: Interrupt = field(default_factory=Interrupt, init=False)

    # ---------------------------------------------------------------- start and end

    @contextmanager
    def started(self) -> Iterator[Coordinator]:
        """Workers, the handlers of signals, and the orderly end.

        Raises:
            BaseException: The first error, also where the end has met others.
        """
        ending = Ending()
        local = self.task.settings.strategy == "local"
        with AskedWhere(self._group, local), Interrupt() as self._interrupt:
            # twice, as a signal may strike on the way out of the first
            with ending.step("the run"), ending.step("the run"):
                coordinator = self._begin()
                yield coordinator
                if self._interrupt.requested:
                    self._say_ended("interrupted")
            if self._interrupt.terminated and isinstance(ending.error, SystemExit):
                ending.error = terminate()  # Ray makes SystemExit(1) of one that comes while it waits
            with ending.step("ending the run"), shield():
                self._interrupt.begin_end()
                self._end(ending)
        if self._interrupt.terminated and not isinstance(ending.error, SystemExit):
            raise terminate() from ending.error
        ending.tell()

    def _group(self) -> WorkerGroup | None:
        return None if self.coordinator is None else self.coordinator.group

    def _begin(self) -> Coordinator:
        """Data and workers; before there is anything to lose, Ctrl-C ends it at once."""
        task, interrupt = self.task, self._interrupt
        hyperparameters = logged_hyperparameters(task)
        with interrupt.at_once():
            prepare_datasets(task, task.settings, self.groups.cluster)
        group = self.regroup()
        marks = [c.every_n_train_steps for c in self._driver_callbacks if c.every_n_train_steps]
        self.coordinator = coordinator = Coordinator(task, group, self.state, self, interrupt, marks)
        self.state.keeps_end = task.stage == "fit" and not self.quiet
        if not self.quiet:
            log.info("%s on %s", task.stage, group.describe())
        if hyperparameters:
            self.logs.each("log_hyperparams", hyperparameters)
        return coordinator

    def _end(self, ending: Ending) -> None:
        """Everything that is to be done at the end, however it comes; see `Ending`."""
        task, state, error = self.task, self.state, ending.error
        if error is not None:
            self._fail(error, ending)
        status = "failed" if state.trainer.status == "failed" else "interrupted" if state.interrupted else "success"
        if error is None and task.profiler is not None:
            with ending.step("writing the profiles"):
                self._write_profiles(task.profiler)
        self.coordinator, state.catch_up = None, nothing
        self._flush(ending)  # before callbacks' teardown, which may want to see the files
        self.emit("teardown", task.stage, around=ending.hook)
        self.logs.finalize(status, ending.hook)
        self._flush(ending)
        for group in self._held:
            with ending.step("giving workers back"):
                self.groups.give_back(group)
        self._held = []
        with ending.step("closing datasets"):
            release_datasets(task)
        if task.stage == "fit":
            state.time_report = state.clock.report()
        if error is None and ending.error is not None:
            self._say_ended(ending.error)

    def _say_ended(self, how: str | BaseException) -> None:
        if isinstance(how, BaseException):
            how = "interrupted" if isinstance(how, KeyboardInterrupt) else "failed"
        self.state.trainer.status = how
        self.state.interrupted |= how == "interrupted"

    def _fail(self, error: BaseException, ending: Ending) -> None:
        self._say_ended(error)
        with ending.step("taking up what was logged last"):
            self._catch_up_after(error)
        self.failing = True
        self.emit("on_exception", error, around=ending.hook)
        self.failing = False
        # after an error of user code workers are between verbs; after Ctrl-C they may be anywhere
        well = isinstance(error, Exception) or isinstance(error.__cause__, WorkerError)
        for group in self._held:
            with ending.step("ending the workers' run"):
                if well:
                    group.call_off()
                else:
                    group.abort()
        lost = None if all(group.in_process for group in self._held) else explain_lost(error)
        if lost is not None:
            lost.__cause__, ending.error = error, lost

    def _catch_up_after(self, error: BaseException) -> None:
        """Workers that are well still report what has been logged up to the error."""
        coordinator = self.coordinator
        if coordinator is not None and self.state.trainer.has_begun:
            group = coordinator.group
            if group.in_process or (isinstance(error, Exception) and not group.broken):
                with suppress(Exception):
                    coordinator.catch_up(failed=True)
        self.state.catch_up = nothing

    def _flush(self, ending: Ending) -> None:
        """Wait for checkpoints from workers that may not stay, unless the user has been too impatient for that."""
        if self._impatient and self.writer.busy:
            return
        with ending.step("writing checkpoints"), self.state.clock.phase("saving"):
            try:
                self.writer.flush()
            except (KeyboardInterrupt, SystemExit):
                self._impatient = True
                raise

    def _write_profiles(self, profiler: Profiler) -> None:
        folder = Path(first_log_dir(self.logs.loggers) or self.task.default_root_dir)
        name = "profile" if self.task.stage == "fit" else f"profile_{self.task.stage}"
        write_profiles(profiler, self.state.profiles, folder / name)

    # ---------------------------------------------------------------- what the coordinator asks for

    def log_rows(self, rows: Rows) -> None:
        """Give rows (step, values) to the loggers."""
        self.logs.rows(rows)

    def replay(self, calls: Sequence[LogCall], step: int) -> None:
        """Make calls that rank 0 has kept; `step` is that of those without one."""
        self.logs.replay(calls, step)

    def callback_states(self) -> dict[str, Any]:
        """States of the driver's callbacks."""
        return states_of(self._driver_callbacks)

    def restore_callbacks(self, states: dict[str, Any]) -> None:
        """Put them back."""
        put_back(self._driver_callbacks, states)

    def regroup(self) -> WorkerGroup:
        """Workers to begin with, or in place of others. They may be long in coming, so Ctrl-C ends that at once."""
        with self._interrupt.at_once():
            if self.coordinator is None:  # else what it had prepared is in use
                self.groups.prepare(self.task.settings)
            with shield():
                self._held = [group for group in self._held if not group.broken]
                self._held.append(group := self.groups.take(self.task.settings))
        return group

    def grow(self, group: WorkerGroup, ready: Callable[[], None]) -> WorkerGroup | None:
        """See `GroupSupply.grow`."""
        with shield():
            larger = self.groups.grow(self.task.settings, group, ready)
            if larger is not None:
                self._held = [*(held for held in self._held if not held.broken), larger]
        return larger

    def can_grow(self, group: WorkerGroup) -> bool:
        """Whether there could be more workers than `group` has."""
        return self.groups.can_grow(self.task.settings, group)

    @property
    def _driver_callbacks(self) -> list[Callback]:
        return [callback for callback in self.callbacks if isinstance(callback, Callback)]

    # ---------------------------------------------------------------- checkpoints

    def resume(self, checkpoint: dict[str, Any], coordinator: Coordinator) -> None:
        """Take up the counters and callbacks of a checkpoint; workers take up the rest.

        Raises:
            CheckpointError: It holds weights only.
        """
        if "progress" not in checkpoint:
            raise CheckpointError(
                f"{checkpoint['path']}: it holds weights only, so training cannot go on from it; load it with "
                f"{type(self.task.module).__name__}.load_from_checkpoint(...) and fit that."
            )
        self.state.resumed_from = path = checkpoint.pop("path")
        if "made_by" in checkpoint:
            log.info(
                "%s is a checkpoint of %s: going on with its weights, %d optimizer(s), %d scheduler(s), epoch %d, step "
                "%d. Left out: %s.", path, checkpoint["made_by"], len(checkpoint["optimizer_states"]),
                len(checkpoint["lr_schedulers"]), checkpoint["epoch"], checkpoint["global_step"],
                ", ".join(checkpoint.pop("left_out")),
            )  # fmt: skip
        coordinator.take_up(checkpoint)
        self.emit("on_load_checkpoint", checkpoint)
        self.restore_callbacks(checkpoint.get("callbacks") or {})

    def save(
        self, path: str, weights_only: bool, wait: bool, on_error: Callable[[StorageError], None] | None = None
    ) -> bool:
        """Save a checkpoint of the workers' state; return whether they have one, or had when the run failed.

        Raises:
            CheckpointError: The run has failed, and there is nothing to save.
        """
        coordinator = self.coordinator
        if coordinator is not None and self.failing:
            write_checkpoint(path, self._rescued(coordinator))
            return True
        if coordinator is None or self.state.trainer.status != "running":
            return False
        with self.state.clock.phase("saving"):
            captured = coordinator.capture(weights_only)
            if any(overridden(callback, "on_save_checkpoint") for callback in self._driver_callbacks):
                state = captured.resolve()
                tensors = tensors_in(state)
                self.emit("on_save_checkpoint", state)
                state = own_copy(state, keep=tensors)  # hooks may have put in what they go on to change
                self.writer.save(path, captured.giving(state), on_error)
            else:
                self.writer.save(path, captured.resolve, on_error)
            if wait:
                self.writer.flush()
        return True

    def _rescued(self, coordinator: Coordinator) -> dict[str, Any]:
        state = coordinator.rescue()
        if state is None:
            raise CheckpointError("save_checkpoint: the run has failed before there was a snapshot to save.")
        self.emit("on_save_checkpoint", state)
        return state
