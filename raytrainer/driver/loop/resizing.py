"""`Resizing`: other places for a `fit` that is well: more, where there are any, and others for those that are to go.

Looked for at the ends of chunks, so also within an epoch, whose rest is dealt out anew. Workers that are well go on
until it is sure that others can take their place.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from raytrainer.checkpointing.pieces import brought_here
from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.saving.capture_restore import RunCapture
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import ResourceError
from raytrainer.plan.recoveries import Recovery
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import is_done
from raytrainer.view.run_state import RunState

__all__ = ["OtherWorkers", "Resizing"]

log = logging.getLogger("raytrainer")

#: Seconds between two looks, and while processes start in new places; each asks Ray, which takes a millisecond or two.
LOOK_EVERY, STARTING = 2.5, 0.5

#: Seconds until the next try after one that has failed; doubled each time, up to `SELDOM`.
PAUSE, SELDOM = 10.0, 300.0

#: Seconds before a node goes at which its workers leave it, whatever there is elsewhere.
MARGIN = 20.0


class OtherWorkers(Exception):
    """Training goes on with `group`, from `state`."""

    def __init__(self, group: WorkerGroup, state: dict[str, Any]) -> None:
        super().__init__()
        self.group, self.state = group, state


class Resizing:
    """Changes the workers of one `fit`.

    Args:
        settings: Of the run.
        state: Counters.
        services: Have the workers.
        capture: Takes states.

    Attributes:
        divisible: Whether the rest of the epoch in progress can be dealt out to another number of workers.
    """

    def __init__(self, settings: Settings, state: RunState, services: RunServices, capture: RunCapture) -> None:
        self._settings, self._state, self._services, self._capture = settings, state, services, capture
        self.divisible = False
        self._next = self._not_before = 0.0
        self._pause = PAUSE
        self._told: set[str] = set()  # nodes that are to go

    def look(self, group: WorkerGroup) -> None:
        """Between two chunks, or before an epoch.

        Raises:
            OtherWorkers: These go on.
        """
        progress, now = self._state.progress, time.monotonic()
        if group.in_process or now < self._next or not progress.total_batches:
            return
        if self._state.interrupted or is_done(self._settings, progress, self._state.should_stop):
            return
        accumulate = self._settings.accumulated(progress.epoch)
        if progress.epoch_ended or progress.batch % accumulate:
            return  # these workers alone have the ended epoch's sums, or half a step's gradients
        self._next = now + LOOK_EVERY
        self._leave_if_asked(group)
        if self.divisible or not progress.batch:
            self._grow_if_possible(group, now)
            if self._services.places is not None:
                self._next = now + min(LOOK_EVERY, STARTING)

    # ---------------------------------------------------------------- more

    def _grow_if_possible(self, group: WorkerGroup, now: float) -> None:
        services, places = self._services, self._services.places
        if places is None:
            if now >= self._not_before and services.can_grow(group) and not services.more_places(group):
                self._wait_longer(now)
            return
        try:
            if not places.sure():
                return
        except ResourceError as error:
            log.warning("No more workers for now: %s", error)
            services.withdraw()
            self._wait_longer(now)
            return
        state = self._capture.capture(group).resolve()
        self._pause = PAUSE
        larger = services.grow(group)
        log.info(
            "Epoch %d goes on with %d workers instead of %d, from step %d.", self._state.progress.epoch, larger.size,
            group.size, self._state.progress.step,
        )  # fmt: skip
        raise OtherWorkers(larger, state)

    def _wait_longer(self, now: float) -> None:
        """After a try that has failed: others may have taken what looks free."""
        self._not_before, self._pause = now + self._pause, min(SELDOM, 2 * self._pause)

    # ---------------------------------------------------------------- elsewhere

    def _leave_if_asked(self, group: WorkerGroup) -> None:
        leaving = self._services.leaving(group)
        if not leaving:
            return
        left = min(leaving.values())
        nodes = ", ".join(sorted(node[:8] for node in leaving))
        if not leaving.keys() <= self._told:
            self._told |= leaving.keys()
            log.warning("Ray is to give back node(s) %s, in %.0f s: their workers will go on elsewhere.", nodes, left)
        elsewhere = self._services.elsewhere(group)
        as_many = any(size >= group.size for size in elsewhere)
        whole = self.divisible or not self._state.progress.batch  # a smaller group can go on within the epoch
        if not as_many and left > MARGIN:
            return
        if not as_many and elsewhere and not whole:
            log.warning("Fewer workers begin the epoch anew, as this loader is read as it is on each of them.")
        began, progress = time.perf_counter(), self._state.progress
        # the state comes into this process, since the node that goes takes its memory with it
        state = brought_here(self._capture.capture(group).resolve())
        self._capture.keep(state)
        self._services.withdraw()
        group.abort()
        try:
            other = self._services.regroup_elsewhere(elsewhere)
        except ResourceError:
            self._services.save_homeless(state)
            raise
        moved = Recovery(
            f"node(s) {nodes} were to go", progress.step, progress.step, 0, time.perf_counter() - began, other.size
        )
        self._state.recoveries.append(moved)
        log.warning("Moved. %s", moved)
        raise OtherWorkers(other, state)
