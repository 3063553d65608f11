"""`Journal`: what workers log goes into the board, and to the loggers, each value once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytrainer.driver.loop.run_services import RunServices
from raytrainer.driver.reporting.same_data import SameData
from raytrainer.metric_messages import LogCall, MetricReport, Reduced
from raytrainer.metrics.metric_board import MetricTime
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
        self._logged: dict[str, int] = {}  # how far each kind of row has been logged, so that replays log nothing twice

    def steps(self, kind: str, reports: Sequence[MetricReport]) -> None:
        """Take up what a chunk of a stage ("train", "validate", ...) has logged by step."""
        self._same_data.check(reports)
        self._state.board.now = MetricTime(kind, self._state.progress.total_batches)
        rows = self._state.board.step_values(reports)
        logged = self._logged.get(kind, -1)
        fresh = [(step, {**values, "epoch": epoch}) for step, epoch, values in rows if step > logged]
        if fresh:
            self._logged[kind] = fresh[-1][0]
            self._services.log_rows(fresh)
        self.replay(reports[0].calls)

    def reduce(self, kind: str, reports: Sequence[MetricReport], what: str, **options: Any) -> Reduced:
        """Take up the values of an epoch ("train") or evaluation; see `MetricBoard.epoch_values`. Logs nothing."""
        self._state.board.now = MetricTime(kind, self._state.progress.total_batches)
        return self._state.board.epoch_values(reports, what, **options)

    def epoch(self, kind: str, reduced: Reduced) -> None:
        """Log the values of an epoch, or of an evaluation."""
        progress, values = self._state.progress, reduced.logged
        if not values or self._logged.get(f"{kind} values", -1) >= progress.total_batches > 0:
            return
        self._logged[f"{kind} values"] = progress.total_batches
        # the step of the batch just done, as for values logged with it
        self._services.log_rows([(progress.row, {**values, "epoch": progress.epoch})])

    def replay(self, calls: Sequence[LogCall]) -> None:
        """Make the calls of rank 0's `self.logger`."""
        if calls:
            self._services.replay(calls, self._state.progress.row)
