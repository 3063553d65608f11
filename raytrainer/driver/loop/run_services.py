"""`RunServices`: what the coordinator asks of whoever started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.metric_messages import LogCall

__all__ = ["Rows", "RunServices"]

Rows = list[tuple[int, dict[str, float]]]


class RunServices(Protocol):
    """Callbacks, loggers and workers of a run."""

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

    def grow(self, group: WorkerGroup, ready: Callable[[], None]) -> WorkerGroup | None:
        """A larger group in place of `group`, which ends after `ready` has been called; None: no more workers now."""

    def can_grow(self, group: WorkerGroup) -> bool:
        """Whether an elastic run could have more workers than `group` has."""
