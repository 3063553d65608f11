"""`RunCheckpoints`: the parts of a run, and its checkpoints: taken up, saved when asked for, and after SIGTERM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrainer.callbacks import Callback, WorkerCallback
from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.pieces import KEY
from raytrainer.driver.loop.coordinator import Coordinator
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.reporting.run_loggers import Logs
from raytrainer.driver.saving.callback_states import own_copy, put_back, states_of, tensors_in, without_owner
from raytrainer.driver.saving.checkpoint_writer import CheckpointWriter
from raytrainer.driver.saving.preemption import Preemption
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import CheckpointError, StorageError
from raytrainer.signals import terminate
from raytrainer.task import Task
from raytrainer.view.run_state import RunState
from raytrainer.worker.hook_calls import overridden

__all__ = ["RunCheckpoints"]

log = logging.getLogger("raytrainer")


@dataclass(eq=False)
class RunCheckpoints:
    """What one run needs, and what is kept of it.

    Attributes:
        task: What the workers are given.
        state: Where the run is.
        callbacks: Those of the run, in order.
        emit: Calls a hook of the driver's callbacks.
        logs: The loggers.
        groups: Where workers come from.
        writer: Writes checkpoints.
        quiet: Whether it is a short run that finds something out, which is not talked about.
        preemption: What is done about SIGTERM.
        coordinator: Drives the workers, from their start to the end of the run.
        failing: Whether callbacks are being told that the run has failed.
        is_home: Whether a fit is over, and what it has trained is in the driver's module.
    """

    task: Task
    state: RunState
    callbacks: Sequence[Callback | WorkerCallback]
    emit: Callable[..., None]
    logs: Logs
    groups: GroupSupply
    writer: CheckpointWriter
    quiet: bool = False
    preemption: Preemption = field(default_factory=Preemption)
    coordinator: Coordinator | None = field(default=None, init=False)
    failing: bool = field(default=False, init=False)
    is_home: bool = field(default=False, init=False)
    _interrupt: Interrupt = field(default_factory=Interrupt, init=False)

    # ---------------------------------------------------------------- checkpoints

    def callback_states(self) -> dict[str, Any]:
        """States of the driver's callbacks."""
        return states_of(self._driver_callbacks)

    def restore_callbacks(self, states: dict[str, Any]) -> None:
        """Put them back."""
        put_back(self._driver_callbacks, states)

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
        if "made_by" not in checkpoint and not self.quiet:
            progress = self.state.progress
            log.info("Going on from %s: step %d, epoch %d.", path, progress.step, progress.epoch)
            if missing := without_owner(checkpoint, [*self.callbacks, *self.task.callbacks]):
                log.warning(
                    "%s has the state of callbacks that this Trainer does not have, with these arguments: %s. It is "
                    "left out; to go on with it, give the Trainer those callbacks.", path, "; ".join(missing),
                )  # fmt: skip
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
        if coordinator is not None and self.failing and not self.is_home:
            self._write_in_turn(path, self._rescued(coordinator))
            return True
        if coordinator is None or self.state.trainer.status != "running":
            return False
        looked_at = any(overridden(callback, "on_save_checkpoint") for callback in self._driver_callbacks)
        progress = self.state.progress
        moment = (progress.total_batches, progress.step) if coordinator.group.in_process else None
        with self.state.clock.phase("saving"), self.writer.expecting():
            if looked_at or coordinator.group.in_process:
                self.writer.await_others(moment)  # at most one copy of the state in this process
            captured = coordinator.capture(weights_only)
            if looked_at:
                state = captured.resolve()
                pieces = {KEY: state.pop(KEY)} if KEY in state else {}
                tensors = tensors_in(state)
                self.emit("on_save_checkpoint", state)
                state = own_copy(state, keep=tensors)  # a hook may go on to change what it has put in
                self.writer.save(path, captured.giving(state | pieces), on_error, moment)
            else:
                self.writer.save(path, captured.resolve, on_error, moment)
            if not weights_only:
                coordinator.snapshots.written(path)
            if wait:
                self.writer.flush()
        return True

    def await_writer(self, condition: Callable[[], bool]) -> None:
        """See `RunServices`."""
        self.writer.await_room(condition)

    def _write_in_turn(self, path: str, state: dict[str, Any]) -> None:
        """Write a state when all that was asked for before is written, so that the newest checkpoint is this one."""
        self._let_writer_end()
        write_checkpoint(path, state)

    def _let_writer_end(self) -> None:
        """Wait for the writer. If it failed, the user has been told, and what comes now is written all the same."""
        try:
            self.writer.flush()
        except Exception as error:
            log.warning("A checkpoint has not been written: %s", error)

    def _rescued(self, coordinator: Coordinator) -> dict[str, Any]:
        state = coordinator.rescue()
        if state is None:
            raise CheckpointError("save_checkpoint: the run has failed before there was a snapshot to save.")
        self.emit("on_save_checkpoint", state)
        return state

    # ---------------------------------------------------------------- SIGTERM

    def end_if_preempted(self) -> None:
        """After SIGTERM: save this very step, and end the run."""
        if not self._interrupt.terminated:
            return
        self._let_writer_end()
        self._save_preempted(lambda path: self.save(path, weights_only=False, wait=True))
        raise terminate()

    def save_in_the_end(self, error: BaseException) -> None:
        """After SIGTERM, the run being over: save what has not been saved by now, if there is time; and say so."""
        interrupt, coordinator = self._interrupt, self.coordinator
        if self.preemption.saved is None and interrupt.to_save:
            # an error of its own: loader processes, or workers, were ended as well, say
            in_time = isinstance(error, Exception) and not interrupt.overdue
            state = coordinator.rescue() if in_time and coordinator is not None else None
            if state is not None:
                self._save_preempted(lambda path: self._write_in_turn(path, state))
            if self.preemption.saved is None:
                self.preemption.say_lost(self.callbacks, self.state.progress.step)
        interrupt.stop_clock()

    def _save_preempted(self, write: Callable[[str], object]) -> None:
        def when() -> str:
            return f"{self._interrupt.since:.1f} s after SIGTERM"

        self.preemption.save(self.callbacks, write, self.state.progress.step, when, self.state.resumed_from)

    def save_homeless(self, state: dict[str, Any]) -> None:
        """Save a sound state for which there are no workers any more, so that another run can go on from it."""
        step = self.state.progress.step
        self.preemption.save(
            self.callbacks, lambda path: self._write_in_turn(path, state), step, lambda: "as its nodes were to go",
            self.state.resumed_from,
        )  # fmt: skip

    @property
    def _driver_callbacks(self) -> list[Callback]:
        return [callback for callback in self.callbacks if isinstance(callback, Callback)]
