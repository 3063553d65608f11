"""Every Python function below the hooks, by cProfile."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raytrainer.errors import ConfigurationError
from raytrainer.profilers.profiler import Profiler

if TYPE_CHECKING:
    import torch

__all__ = ["AdvancedProfiler"]


class AdvancedProfiler(Profiler):
    """cProfile's table of all functions that ran inside hooks. Slows down what it watches.

    Args:
        lines: Functions to list, those first that took longest with all they called.

    Raises:
        ConfigurationError: `lines` is below 1.
    """

    def __init__(self, lines: int = 50) -> None:
        super().__init__()
        if lines < 1:
            raise ConfigurationError(f"AdvancedProfiler(lines={lines}): must be 1 or more.")
        self.lines = lines
        self._profile: cProfile.Profile | None = None
        self._depth = 0

    def start(self, rank: int, device: torch.device) -> None:
        """Begin with an empty table."""
        self._profile, self._depth = cProfile.Profile(), 0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, watched unless it runs inside another that is."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            profile = self._profile
            if profile is None or self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            profile.enable()
            try:
                return function(*args, **kwargs)
            finally:
                profile.disable()
                self._depth -= 1

        return watched

    def stop(self) -> bytes | None:
        """The table."""
        profile, self._profile = self._profile, None
        if profile is None or not profile.getstats():
            return None
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(self.lines)
        return text.getvalue().encode()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_profile": None}
