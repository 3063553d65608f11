"""Where the time of a `fit` went: a clock that is always in exactly one phase, and what it says in the end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

__all__ = ["PhaseClock", "TimeReport"]

_WORDS = {
    "data": "waiting for data", "computing": "computing", "synchronising": "synchronising", "validating": "validating",
    "saving": "saving", "starting": "starting", "other": "other",
}  # fmt: skip
#: What to do about waiting for data, where it is a Ray Dataset and where not.
_ADVICE = {
    False: "raise num_workers",
    True: "raise RayDataset(prefetch_batches=...), have Ray keep the blocks (keep_in_memory=True), or leave more CPUs "
    "to Ray Data",
}
#: Below this many seconds a fit is too short to advise on.
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class TimeReport:
    """Seconds of one `fit` by what they went to; they add up to `total`.

    Attributes:
        total: From the call of `fit` to its end.
        starting: Until training began: getting workers, setting up, also again after losses.
        data: Training batches were waited for; of several workers, the one that waited most counts in each chunk.
        computing: The rest of the workers' time in training batches, averaging gradients included: nothing but the
            device could tell these apart, and asking it would slow it down.
        synchronising: The driver waited for workers in training beyond that: commands, reports, and the last worker.
        validating: Validation in `fit`, the sanity check included.
        saving: Training stood still for checkpoints and snapshots; what is written in the background does not count.
        other: Hooks and callbacks around epochs, logging, and bringing results home.
        ray_data: Whether training read a Ray Dataset.
    """

    total: float = 0.0
    starting: float = 0.0
    data: float = 0.0
    computing: float = 0.0
    synchronising: float = 0.0
    validating: float = 0.0
    saving: float = 0.0
    other: float = 0.0
    ray_data: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """Each part as a share of the total, from 0 to 1."""
        parts = {name: seconds for name, seconds in asdict(self).items() if name not in ("total", "ray_data")}
        return {name: seconds / self.total if self.total else 0.0 for name, seconds in parts.items()}

    @property
    def hint(self) -> str | None:
        """What to do about it, where waiting for data dominates."""
        if self.total < _LEAST_SECONDS or self.data <= self.computing or self.shares["data"] < 0.25:
            return None
        return f"{self.shares['data'] * 100:.0f} % of the time the workers waited for data: {_ADVICE[self.ray_data]}."

    def __str__(self) -> str:
        shares = self.shares
        parts = [f"{shares[name] * 100:.0f} % {words}" for name, words in _WORDS.items() if shares[name] >= 0.005]
        return f"{self.total:.1f} s: {', '.join(parts)}"


class PhaseClock:
    """Adds up seconds by phase. A phase inside another interrupts it, so nothing is counted twice.

    Attributes:
        ray_data: Whether training reads a Ray Dataset; for the report.
    """

    def __init__(self) -> None:
        self.ray_data = False
        self._phases = ["starting"]
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._began = self._mark = time.perf_counter()
        self._busy = self._data = 0.0

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self._phases[-1]] += now - self._mark
        self._mark = now

    def switch(self, phase: str) -> None:
        """What is outside of all phases belongs to `phase` from now on."""
        self._turn()
        self._phases[0] = phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, time belongs to `name`."""
        self._turn()
        self._phases.append(name)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    def move(self, before: str, now: str, seconds: float) -> None:
        """So much of the time of the phase `before`, which is over, was in truth that of another one."""
        self._seconds[before] -= seconds
        self._seconds[now] += seconds

    def chunk(self, seconds: float, data: float) -> None:
        """Of the time in phase "training", workers were busy for `seconds`, of which they waited `data` for data."""
        self._busy += seconds
        self._data += min(data, seconds)

    def report(self) -> TimeReport:
        """All up to now."""
        self._turn()
        known = {name: self._seconds[name] for name in ("starting", "validating", "saving")}
        training = self._seconds["training"]
        busy = min(self._busy, training)  # clocks of several processes need not agree
        data = min(self._data, busy)
        total = self._mark - self._began
        known |= {"data": data, "computing": busy - data, "synchronising": training - busy}
        return TimeReport(total, other=total - sum(known.values()), ray_data=self.ray_data, **known)
