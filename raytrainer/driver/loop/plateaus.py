"""`Plateaus`: schedulers that wait for a metric, such as `ReduceLROnPlateau`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import ConfigurationError
from raytrainer.messages import PlateauWish
from raytrainer.metric_messages import Number
from raytrainer.metrics.exact_numbers import exact
from raytrainer.plan.missing_metric import missing_metric
from raytrainer.view.run_state import RunState
from raytrainer.worker.worker import Worker

__all__ = ["Plateaus"]

log = logging.getLogger("raytrainer")


class Plateaus:
    """Decides which of them act: those whose time has come, and whose metric has a value that is new to them.

    `RunState.plateaus` has, by scheduler, the batch of the value on which it acted last.

    Args:
        state: Counters and metrics.

    Attributes:
        wishes: The schedulers.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.wishes: Sequence[PlateauWish] = ()
        self._warned: set[str] = set()

    @property
    def step_marks(self) -> tuple[int, ...]:
        """Optimizer steps, multiples of each, at which one may act."""
        return tuple(sorted({wish.frequency for wish in self.wishes if wish.interval == "step"}))

    def after_steps(self, group: WorkerGroup, steps: int, validates: bool) -> None:
        """Let those act that count steps, after `steps` more of them, and the validation that is due there."""
        now = self._state.progress.step
        passed = [w for w in self.wishes if w.interval == "step" and now // w.frequency > (now - steps) // w.frequency]
        self._act(group, passed, lambda: self._state.progress.epoch > 0 and self._validated(validates))

    def after_epoch(self, group: WorkerGroup, validates: bool) -> None:
        """Let those act that count epochs, at an epoch's end."""
        done = self._state.progress.epoch + 1
        passed = [wish for wish in self.wishes if wish.interval == "epoch" and done % wish.frequency == 0]
        self._act(group, passed, lambda: self._validated(validates))

    def _validated(self, validates: bool) -> bool:
        """Whether validation cannot bring a missing metric any more: there is none, or there has been one already."""
        return not validates or self._state.progress.validated_at >= 0

    def _act(self, group: WorkerGroup, due: Sequence[PlateauWish], too_late: Callable[[], bool]) -> None:
        if not due:
            return
        self._state.catch_up()
        board, acted = self._state.board, self._state.plateaus
        values: dict[int, Number] = {}
        for wish in due:
            if wish.monitor not in board.callback:
                if too_late():
                    self._complain(wish)
                continue
            time = board.times.get(wish.monitor)
            if time is None or time.batch > acted.get(wish.index, -1):
                acted[wish.index] = self._state.progress.total_batches if time is None else time.batch
                values[wish.index] = exact(board.callback[wish.monitor].item())
        if values:
            group.call(Worker.step_plateaus, values, board.take_news())

    def _complain(self, wish: PlateauWish) -> None:
        told = missing_metric(wish.monitor, self._state.board.callback, self._state.progress.validated_at >= 0)
        message = f"{wish.kind} monitors {wish.monitor!r}: {told}"
        if wish.strict:
            raise ConfigurationError(f"{message}; strict=False leaves the step out")
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)
