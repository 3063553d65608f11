"""`Run`: one run of a Trainer, from the start of its workers to its orderly end, however it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from raytrainer.callbacks import ModelCheckpoint
from raytrainer.driver.cluster.session import explain_lost
from raytrainer.driver.loop.asked_where import AskedWhere
from raytrainer.driver.loop.coordinator import Coordinator
from raytrainer.driver.loop.evaluation import sees_it_begin
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.loop.run_services import Rows
from raytrainer.driver.prepare.ray_datasets import prepare_datasets, release_datasets
from raytrainer.driver.reporting.logged_hyperparameters import logged_hyperparameters
from raytrainer.driver.reporting.results import say_where_files_go, write_profiles
from raytrainer.driver.run_checkpoints import RunCheckpoints
from raytrainer.driver.saving.preemption import say_interrupted
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.ending import Ending
from raytrainer.errors import WorkerError, WorkerLostError
from raytrainer.loggers.logger import first_log_dir
from raytrainer.metric_messages import LogCall
from raytrainer.profilers import Profiler
from raytrainer.quick_imports import importing
from raytrainer.signals import shield, terminate
from raytrainer.view.run_state import nothing
from raytrainer.worker.worker import Worker

if TYPE_CHECKING:
    from raytrainer.driver.workers.ray_more_places import MorePlaces

__all__ = ["Run"]

log = logging.getLogger("raytrainer")

#: Seconds after which a start that fails is not repeated: where workers were silent for so long, others would be too.
LONGEST_START = 1800.0


@dataclass(eq=False)
class Run(RunCheckpoints):
    """What one run does; the `RunServices` of its coordinator. What it needs: see `RunCheckpoints`."""

    _held: list[WorkerGroup] = field(default_factory=list, init=False)  # to be given back
    _impatient: bool = field(default=False, init=False)
    places: MorePlaces | None = field(default=None, init=False)  # for further workers

    # ---------------------------------------------------------------- start and end

    @contextmanager
    def started(self) -> Iterator[Coordinator]:
        """Workers, the handlers of signals, and the orderly end.

        Raises:
            BaseException: The first error, also where the end has met others.
        """
        ending = Ending()
        saves = self.task.stage == "fit" and not self.quiet and not self.task.settings.fast_dev_run
        grace = self.preemption.seconds(self.callbacks) if saves else 0.0
        asked = AskedWhere(self._group, self.task.settings.strategy == "local")
        with asked, Interrupt(grace, self.writer.give_up) as self._interrupt:
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
        if self._interrupt.terminated:
            error = ending.error
            last = self.preemption.end(ends_anyway=self.task.stage != "fit")
            if last is not None:
                raise last from None if isinstance(error, SystemExit) else error
            if isinstance(error, SystemExit):
                return
        ending.tell()

    def _group(self) -> WorkerGroup | None:
        return None if self.coordinator is None else self.coordinator.group

    def _begin(self) -> Coordinator:
        """Data and workers; before there is anything to lose, Ctrl-C ends it at once."""
        task, interrupt = self.task, self._interrupt
        hyperparameters = logged_hyperparameters(task)
        with interrupt.at_once():
            prepare_datasets(task, task.settings, self.groups.cluster)
        group, lost = self._first_group()
        marks = [c.every_n_train_steps for c in self._driver_callbacks if c.every_n_train_steps]
        self.coordinator = coordinator = Coordinator(task, group, self.state, self, interrupt, marks, lost)
        coordinator.snapshots.saves = any(isinstance(c, ModelCheckpoint) and c.saves for c in self._driver_callbacks)
        coordinator.evaluation.unseen = not any(sees_it_begin(callback) for callback in self._driver_callbacks)
        self.state.keeps_end = task.stage == "fit" and not self.quiet
        if not self.quiet:
            log.info("%s on %s", task.stage, group.describe())
            if task.stage == "fit" and not task.settings.fast_dev_run:
                say_where_files_go(self.logs.loggers, self.callbacks, task.default_root_dir)
        if hyperparameters:
            self.logs.each("log_hyperparams", hyperparameters)
        return coordinator

    def _first_group(self) -> tuple[WorkerGroup, list[tuple[WorkerLostError, float]]]:
        """Workers to begin with, and those that were lost before all were there, with the time at which it was seen.

        Raises:
            WorkerLostError: A `fit` may not lose as many, or whoever comes next would be lost likewise.
        """
        lost, began = list[tuple[WorkerLostError, float]](), time.perf_counter()
        allowed = self.task.settings.max_failures if self.task.stage == "fit" else 0
        while True:
            try:
                return self.regroup(), lost
            except WorkerLostError as error:
                lost.append((error, time.perf_counter()))
                silent = lost[-1][1] - began >= LONGEST_START
                apart = sum(one.unreachable for one, _ in lost) > 1  # at first somebody may be gone, as Ray is to say
                if len(lost) > allowed or silent or apart or not error.could_start:
                    raise
                log.warning("%s All workers start anew.", error)

    def _end(self, ending: Ending) -> None:
        """Everything that is to be done at the end, however it comes; see `Ending`."""
        task, state, error = self.task, self.state, ending.error
        state.preempted = self._interrupt.terminated
        if error is not None:
            self._fail(error, ending)
        status = "failed" if state.trainer.status == "failed" else "interrupted" if state.interrupted else "success"
        if error is None and task.profiler is not None:
            with ending.step("writing the profiles"):
                self._write_profiles(task.profiler)
        if self.coordinator is not None:
            self.coordinator.snapshots.drop()  # of which much memory is
        self.coordinator, state.catch_up = None, nothing
        self._flush(ending)  # before callbacks' teardown, which may want to see the files
        self.emit("teardown", task.stage, around=ending.hook)
        self.logs.finalize(status, ending.hook)
        self._flush(ending)
        with ending.step("giving places back"):
            self.withdraw()
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
        if state.interrupted and not state.preempted and task.stage == "fit" and not self.quiet:
            say_interrupted(self.callbacks, state.progress.step, state.resumed_from)

    def _say_ended(self, how: str | BaseException) -> None:
        if isinstance(how, BaseException):
            preempted = self._interrupt.terminated and isinstance(how, SystemExit)
            how = "interrupted" if preempted or isinstance(how, KeyboardInterrupt) else "failed"
        self.state.trainer.status = how
        self.state.interrupted |= how == "interrupted"

    def _fail(self, error: BaseException, ending: Ending) -> None:
        self._say_ended(error)
        with ending.step("taking up what was logged last"):
            self._catch_up_after(error)
        if self._interrupt.terminated:
            with ending.step("saving what SIGTERM has left"):
                self.save_in_the_end(error)
        coordinator = self.coordinator
        if coordinator is not None and coordinator.group.in_process:  # whose callbacks leave the driver's own module
            with ending.step("telling callbacks beside the module"):
                coordinator.group.call(Worker.tell, error)
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

    def regroup(self, wounded: WorkerGroup | None = None) -> WorkerGroup:
        """See `GroupSupply.mend_or_take`. Workers may be long in coming, so Ctrl-C ends that at once."""
        self.withdraw()  # places that were asked for to grow: this group first gets back to its size
        with self._interrupt.at_once(), importing():  # until workers begin to start
            if self.coordinator is None:  # a running group has had this done at its start
                self.groups.prepare(self.task.settings)
            with shield():
                group = self.groups.mend_or_take(self.task.settings, wounded, self._held)
                self._held = [*(held for held in self._held if not held.broken), group]
        return group

    def can_grow(self, group: WorkerGroup) -> bool:
        """Whether there could be more workers than `group` has."""
        return self.groups.can_grow(self.task.settings, group)

    def more_places(self, group: WorkerGroup) -> bool:
        """See `GroupSupply.more_places`; whether there are any, which are `places` then."""
        with shield():
            self.places = self.groups.more_places(self.task.settings, group)
        return self.places is not None

    def withdraw(self) -> None:
        """Give `places` back."""
        with shield():
            places, self.places = self.places, None
            if places is not None:
                places.give_back()

    def grow(self, group: WorkerGroup) -> WorkerGroup:
        """A group of `group`'s workers, which ends, and of others in `places`."""
        with shield():
            places, self.places = self.places, None
            assert places is not None
            larger = self.groups.grow(group, places)
            self._held = [*(held for held in self._held if not held.broken), larger]
        return larger

    def leaving(self, group: WorkerGroup) -> dict[str, float]:
        """See `GroupSupply.leaving`."""
        return self.groups.leaving(group)

    def elsewhere(self, group: WorkerGroup) -> list[int]:
        """See `GroupSupply.elsewhere`."""
        return self.groups.elsewhere(self.task.settings, group)

    def regroup_elsewhere(self, sizes: Sequence[int]) -> WorkerGroup:
        """See `GroupSupply.take`."""
        with self._interrupt.at_once(), shield():
            self._held = [group for group in self._held if not group.broken]
            self._held.append(group := self.groups.take(self.task.settings, sizes))
        return group
