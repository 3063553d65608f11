"""`RunServices`: what the coordinator asks of whoever started it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.metric_messages import LogCall

__all__ = ["Places", "Rows", "RunServices"]


class Places(Protocol):
    """Room for further workers."""

    def sure(self) -> bool:
        """Whether workers can start there; never waits. Raises ResourceError where they cannot."""


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

    def await_writer(self, condition: Callable[[], bool]) -> None:
        """Wait until this holds, or no checkpoint is being written any more."""

    def end_if_preempted(self) -> None:
        """If SIGTERM has come: save the state that the workers have now, and end the run."""

    def regroup(self, wounded: WorkerGroup | None = None) -> WorkerGroup:
        """Workers in place of the group's: all new, or those left of a `wounded` group with others for the lost."""

    def can_grow(self, group: WorkerGroup) -> bool:
        """Whether an elastic run could have more workers than `group` has."""

    @property
    def places(self) -> Places | None:
        """Where further workers would be, once these have been asked for."""

    def more_places(self, group: WorkerGroup) -> bool:
        """Ask for them; whether they are to be had."""

    def withdraw(self) -> None:
        """Give them back, if there are any."""

    def grow(self, group: WorkerGroup) -> WorkerGroup:
        """A larger group with workers there, in place of `group`, which ends."""

    def leaving(self, group: WorkerGroup) -> dict[str, float]:
        """Nodes with workers of this group that are to go, by id, and in how many seconds."""

    def elsewhere(self, group: WorkerGroup) -> list[int]:
        """Sizes, the most first, of groups that could be without these nodes, and that the run may have."""

    def save_homeless(self, state: dict[str, Any]) -> None:
        """Save a state for which there are no workers any more."""

    def regroup_elsewhere(self, sizes: Sequence[int]) -> WorkerGroup:
        """A group of the first of these sizes that is to be had; of none: of any, once there is room."""
