"""In-memory snapshots: the state to go on from when a worker is lost, kept off the disk."""

from __future__ import annotations

import logging
import time
from typing import Any

from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.saving.checkpoint_writer import Captured
from raytrainer.errors import CheckpointError
from raytrainer.plan.recoveries import snapshot_due
from raytrainer.plan.settings import Settings

__all__ = ["Snapshots"]

log = logging.getLogger("raytrainer")


class Snapshots:
    """The newest states of a run. Every full checkpoint counts as one too.

    Args:
        settings: How often.
        enabled: Whether there is anything to recover from: workers in the driver's process die with it.

    Attributes:
        saves: Whether callbacks save checkpoints, so that a copy is certain to come.
        owed: Whether the next one is to be taken as soon as can be.
        recorded: Whether workers record each step, so that snapshots serve where that does not: as often as "auto".
    """

    def __init__(self, settings: Settings, enabled: bool) -> None:
        self.enabled = enabled and settings.max_failures > 0
        self._every = settings.snapshot_every if self.enabled else None
        self.saves = self.recorded = False
        self.owed = False
        self._kept: list[Captured] = []
        self._paths: list[str] = []  # of checkpoints of this run, some of which may be gone by now
        self._taken = time.perf_counter()
        self._step = 0
        self._cost: float | None = None  # of the latest, from the second on
        self._first = True
        self._warm = False
        self._announced = False

    @property
    def every(self) -> int | float | str | None:
        """How often."""
        return "auto" if self.recorded else self._every

    @property
    def step_marks(self) -> tuple[int, ...]:
        """Steps, multiples of each, at which a chunk is to end."""
        return (self.every,) if isinstance(self.every, int) else ()

    def owe(self) -> None:
        """Have the next one taken as soon as can be: training goes on from what no snapshot has."""
        self.owed = True

    def restart(self, step: int) -> None:
        """Training begins, or goes on after a loss, here."""
        self._taken, self._step, self._cost, self._warm = time.perf_counter(), step, None, False
        self._first, self._announced = True, False

    def trained(self) -> None:
        """A chunk has been. The first one's time is that of compiling and the like, which no snapshot would save."""
        if not self._warm and self.every == "auto":
            self._taken = time.perf_counter()
        self._warm = True

    def let_go(self) -> None:
        """The state before the newest goes as soon as that one is safe: a large one is not needed twice."""
        if len(self._kept) > 1 and self._kept[-1].complete:
            del self._kept[:-1]

    def drop(self) -> None:
        """None of them is there any more: the memory is needed for the next one."""
        self._kept.clear()

    def written(self, path: str) -> None:
        """A full checkpoint is on its way to `path`."""
        if self.enabled:
            self._paths = [*(known for known in self._paths if known != path), path]

    def due(self, step: int) -> bool:
        return self.owed or snapshot_due(self.every, time.perf_counter() - self._taken, step - self._step, self._cost)

    def approaching(self, step: int) -> bool:
        """Whether half the way to the first one has been gone; said once, and after a step: optimizers' states grow.

        Where callbacks save, the first step is enough.
        """
        if self._announced or not self._first or step <= self._step:
            return False
        passed = time.perf_counter() - self._taken
        self._announced = self.saves or snapshot_due(self.every, 2 * passed, 2 * (step - self._step), None)
        return self._announced

    def take(self, captured: Captured, step: int, cost: float) -> None:
        """Keep a state whose copying blocked training for `cost` seconds."""
        if not self.enabled:
            return
        self.owed = False
        # the one before is kept for now: a worker may die before it has handed over the newest
        self._kept = [*self._kept[-1:], captured]
        # a worker's first copy also allocates the memory for all later ones, so its time is no guide to theirs
        self._cost, self._first = None if self._first else cost, False
        self._taken, self._step = time.perf_counter(), step

    def latest(self) -> dict[str, Any] | None:
        """The newest state that can still be fetched."""
        while self._kept:
            captured = self._kept[-1]
            try:
                return captured.resolve()
            except Exception as error:
                log.warning("A snapshot cannot be fetched any more (%s); using an older one.", error)
                self._kept.pop()
        return None

    def newest_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint of this run that can be read, for one of whose snapshots none is left."""
        while self._paths:
            try:
                checkpoint = read_checkpoint(self._paths[-1], lazily=True)
                if "progress" in checkpoint:
                    log.warning("There is no snapshot. Going on from %s.", self._paths[-1])
                    return checkpoint
            except CheckpointError as error:
                log.info("Not going on from %s: %s", self._paths[-1], error)
            self._paths.pop()
        return None
