"""`Beginning`: the state that workers begin with, in the driver's memory only until they have taken it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Beginning"]


class Beginning:
    """A checkpoint or a snapshot for workers to take up.

    Args:
        state: It.
        again: Reads it anew, for workers in place of those that were lost before there was a snapshot. None: it cannot
            be read anew, and is kept.
        once: Others have it, and will be asked: it is not to be kept for them.
    """

    def __init__(
        self, state: dict[str, Any], again: Callable[[], dict[str, Any]] | None = None, once: bool = False
    ) -> None:
        self._state: dict[str, Any] | None = state
        self._again, self._once = again, once

    @property
    def state(self) -> dict[str, Any]:
        """It, read anew if it was let go.

        Raises:
            CheckpointError: It is not there any more.
        """
        if self._state is None:
            assert self._again is not None
            self._state = self._again()
        return self._state

    def taken_up(self, for_good: bool) -> None:
        """Let go of it. `for_good`: it will not be asked for again."""
        if for_good or self._once or self._again is not None:
            self._state = None
