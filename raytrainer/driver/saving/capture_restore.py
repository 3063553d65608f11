"""`RunCapture`: the whole state of a run, copied aside while training goes on, and restored from a copy."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from raytrainer.checkpointing.checkpoint_format import IN_MEMORY
from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.saving.checkpoint_writer import Captured
from raytrainer.driver.saving.recorded_state import RecordedState
from raytrainer.driver.saving.snapshots import Snapshots
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.plan.steps_and_epochs import Progress
from raytrainer.task import Task
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["RunCapture", "count_up"]

log = logging.getLogger("raytrainer")


def count_up(group: WorkerGroup, state: RunState) -> None:
    """Have the driver's counters and stage be those of workers whose chunk, or validation with it, has failed."""
    cursors, progress = group.call(Worker.cursor), state.progress
    cursor = cursors[0]
    # after an epoch's end the driver is in the next one before workers are, if they are to begin it at all
    if cursor is not None and not progress.epoch_ended and cursor[0] == progress.epoch:
        progress.total_batches += cursor[1] - progress.batch
        _, progress.batch, progress.step, _ = cursor
    if all(one is not None and one[3] == "validate" for one in cursors):  # who has failed was through with training
        state.trainer.stage = "validate"


class RunCapture:
    """What checkpoints and snapshots of one run hold.

    Args:
        task: What the workers were given.
        state: The driver's counters and metrics.
        services: Have the driver's callbacks, whose states belong to it.
        snapshots: Where the newest states are kept.
    """

    def __init__(self, task: Task, state: RunState, services: RunServices, snapshots: Snapshots) -> None:
        self._task, self._state, self._services, self._snapshots = task, state, services, snapshots
        self._chunks: dict[int, dict[str, Any]] = {}  # the driver's part at the beginning of the last three

    def begin_chunk(self, group: WorkerGroup, chunk: int) -> None:
        """Training goes on, with this chunk: where workers record each step, what it begins with is remembered."""
        self._chunks = dict([*self._chunks.items()][-2:]) if self._snapshots.recorded else {}
        if self._snapshots.recorded:
            self._chunks[chunk] = self._driver_state(group)

    def recorded(self, group: WorkerGroup) -> RecordedState | None:
        """The newest state that the workers of before `group`, which is theirs mended, have recorded."""
        chunks, self._chunks = self._chunks, {}
        found = group.recorded(chunks) if chunks else None
        try:
            return None if found is None else RecordedState.of(found, chunks[found.chunk])
        except Exception as error:  # of the user's objects in it: one cannot be had in this process
            log.warning("What workers had recorded cannot be read: %s: %s", type(error).__name__, error)
            return None

    def capture(self, group: WorkerGroup, weights_only: bool = False) -> Captured:
        """Have the state of the run copied aside; training may go on at once."""
        began = time.perf_counter()
        self._state.catch_up()  # a state goes on after what has been reported
        with self._state.clock.phase("saving"):
            self._make_room(group, weights_only)
            copies = group.capture(weights_only)
        captured = Captured(copies, {} if weights_only else self._driver_state(group))
        if not weights_only:
            self._snapshots.take(captured, self._state.progress.step, time.perf_counter() - began)
        return captured

    def _make_room(self, group: WorkerGroup, weights_only: bool = False) -> None:
        """Where there is none: let go of snapshots that are not needed, and wait for checkpoints that are written."""
        room = group.room(weights_only)
        if room.free:
            return
        self._snapshots.let_go()
        if room.single:
            self._snapshots.drop()
        if not group.room(weights_only).free:
            self._services.await_writer(lambda: group.room(weights_only).free)

    def keep(self, state: dict[str, Any]) -> None:
        """Hold a state in this process, as the newest snapshot: those who have the others are to go."""
        self._snapshots.take(Captured.of(state), self._state.progress.step, 0.0)

    def at_end(self, group: WorkerGroup) -> Captured | None:
        """What a checkpoint of the finished fit holds beside the weights, which come home; None: it is not kept."""
        if not self._state.keeps_end:
            return None
        with self._state.clock.phase("saving"):
            self._make_room(group)
            return Captured(group.capture(final=True), self._driver_state(group))

    def snapshot_if_due(self, group: WorkerGroup) -> None:
        """Capture, where the settings ask for it here."""
        self._snapshots.let_go()
        progress = self._state.progress
        accumulate = self._task.settings.accumulated(progress.epoch)
        between_steps = progress.epoch_ended or progress.batch % accumulate == 0
        if between_steps and self._snapshots.due(progress.step):
            self.capture(group)
        elif self._snapshots.approaching(progress.step):
            group.call(Worker.prepare_capture)

    def rescue(self, group: WorkerGroup) -> dict[str, Any] | None:
        """The newest state that can be had of a `fit` that has failed, as a checkpoint; None: there is none.

        Workers in this process still hold the state before the batch that failed. Others may be gone, or wait for each
        other for ever: of them it is the newest snapshot.
        """
        if not group.in_process:
            return self._snapshots.latest()
        if not self._state.trainer.has_begun:
            return None  # before training began, the workers have not taken up what it begins with
        count_up(group, self._state)
        if self._state.trainer.stage == "validate":
            self._state.progress.validated_at = -1  # is to be repeated
        return self.capture(group).resolve()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Put the driver's counters where a checkpoint has them; the workers' verb `restore` does so for them."""
        state, task = self._state, self._task
        state.progress = Progress(**{"row": max(0, checkpoint["global_step"] - 1)} | checkpoint["progress"])
        if checkpoint.get("seed", task.seed) != task.seed:
            if task.settings.seed is not None:
                log.warning("Going on with the checkpoint's seed %s, not %s.", checkpoint["seed"], task.settings.seed)
            task.seed = checkpoint["seed"]
        state.board.restore(checkpoint["metrics"], checkpoint.get("metric_board"))
        state.plateaus = {index: batch for index, batch in checkpoint.get("plateaus", [])}
        lost = {name for own in checkpoint.get("own") or [] for name in own.get(IN_MEMORY, {}).get("lost", ())}
        if lost:
            log.warning(
                "Training has changed %s. That is no data (numbers, tensors, arrays, generators, dataclasses, or "
                "containers of them), so no snapshot has it: it begins anew, and results may not be the same.",
                ", ".join(f"{type(self._task.module).__name__}.{name}" for name in sorted(lost)),
            )  # fmt: skip

    def _driver_state(self, group: WorkerGroup) -> dict[str, Any]:
        state = self._state
        cursor = replace(state.progress)
        if state.closing and cursor.epoch_ended:
            cursor.next_epoch()
        return {
            "progress": vars(cursor),
            "metrics": state.board.plain(),
            "metric_board": state.board.state(),
            "plateaus": [list(item) for item in state.plateaus.items()],
            "should_stop": state.should_stop,
            "callbacks": self._services.callback_states(),
            "world_size": group.size,
            "parts": state.parts,
            "batch_size": state.batch_size,
            "seed": self._task.seed,
        }
