"""`Journal`: what workers log goes into the board, and to the loggers, each value once."""

from __future__ import annotations

from collections.abc import Sequence

from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.reporting.same_data import SameData
from raytrainer.messages import LogCall, MetricReport
from raytrainer.view.run_state import RunState

__all__ = ["Journal"]


class Journal:
    """What one run has logged.

    Args:
        state: Has the board.
        services: Have the loggers.
    """

    def __init__(self, state: RunState, services: RunServices) -> None:
        self._state, self._services = state, services
        self._same_data = SameData()
        self._fresh = False
        self._logged: dict[str, int] = {}  # how far each kind of row has been logged, so that replays log nothing twice

    def take_news(self) -> dict[str, float] | None:
        """The board's values, if an epoch or evaluation has ended since this was called last; else None."""
        fresh, self._fresh = self._fresh, False
        return self._state.board.plain() if fresh else None

    def steps(self, kind: str, reports: Sequence[MetricReport]) -> None:
        """Take up what a chunk has logged by step."""
        self._same_data.check(reports)
        rows = self._state.board.step_values(reports)
        logged = self._logged.get(kind, -1)
        fresh = [(step, {**values, "epoch": epoch}) for step, epoch, values in rows if step > logged]
        if fresh:
            self._logged[kind] = fresh[-1][0]
            self._services.log_rows(fresh)
        self.replay(reports[0].calls)

    def epoch(self, kind: str, values: dict[str, float]) -> None:
        """Log the values of an epoch, or of an evaluation, that the board has."""
        self._fresh = True
        progress = self._state.progress
        if not values or self._logged.get(f"{kind} values", -1) >= progress.total_batches > 0:
            return
        self._logged[f"{kind} values"] = progress.total_batches
        # the step of the batch just done, as for values logged with it
        self._services.log_rows([(max(0, progress.step - 1), {**values, "epoch": progress.epoch})])

    def replay(self, calls: Sequence[LogCall]) -> None:
        """Make the calls of rank 0's `self.logger`."""
        if calls:
            self._services.replay(calls, max(0, self._state.progress.step - 1))
