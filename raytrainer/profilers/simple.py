"""How often each hook was called, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raytrainer.profilers.profiler import Profiler

if TYPE_CHECKING:
    import torch

__all__ = ["SimpleProfiler"]


class SimpleProfiler(Profiler):
    """A table of hooks: calls, mean, total, and share of the run's time.

    Times are the CPU's: of work on a GPU they have the time to launch it, and the hook that first waits for the GPU
    has the rest. A hook that runs inside another counts in both.
    """

    def __init__(self) -> None:
        super().__init__()
        self._times: dict[str, list[float]] = {}
        self._began = 0.0

    def start(self, rank: int, device: torch.device) -> None:
        """Begin at zero."""
        self._times, self._began = {}, time.perf_counter()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""
        entry, clock = self._times.setdefault(name, [0.0, 0.0]), time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                entry[0] += 1
                entry[1] += clock() - began

        return timed

    def stop(self) -> bytes | None:
        """The table."""
        whole = time.perf_counter() - self._began
        rows = [(name, calls, total) for name, (calls, total) in self._times.items() if calls]
        rows.sort(key=lambda row: row[2], reverse=True)
        width = max([9, *(len(name) for name, _, _ in rows)])
        lines = [f"{'hook':<{width}}  {'calls':>8}  {'mean ms':>10}  {'total s':>10}  {'share':>7}"]
        lines += [
            f"{name:<{width}}  {calls:>8.0f}  {total / calls * 1e3:>10.3f}  {total:>10.3f}  {total / whole:>7.1%}"
            for name, calls, total in rows
        ]
        lines.append(f"{'whole run':<{width}}  {'':>8}  {'':>10}  {whole:>10.3f}  {1:>7.1%}")
        return ("\n".join(lines) + "\n").encode()
