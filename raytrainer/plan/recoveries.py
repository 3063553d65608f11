"""Recoveries from lost workers: what is told of each, and when a snapshot for the next one is due."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Continuity", "Recovery", "snapshot_due"]


@dataclass(frozen=True)
class Continuity:
    """Of a group's workers, at its beginning: `kept` were of an earlier group, `spares` had waited to replace some."""

    kept: int = 0
    spares: int = 0


@dataclass(frozen=True)
class Recovery:
    """What the run's report says of one failure.

    Attributes:
        error: What was lost.
        step: Optimizer steps done when it happened.
        resumed_step: The step from which training went on.
        replayed_batches: Batches per worker that were trained again.
        seconds: From noticing the failure to the new group's readiness.
        workers: Size of the new group.
        kept: How many of its workers went on in their processes.
        spares: How many others had waited as spares, and were not started anew.
        source: Of what it went on: "a snapshot", "what each worker had recorded", or "the run's beginning".
    """

    error: str
    step: int
    resumed_step: int
    replayed_batches: int
    seconds: float
    workers: int
    kept: int = 0
    spares: int = 0
    source: str = "a snapshot"

    def __str__(self) -> str:
        new = self.workers - self.kept - self.spares
        parts = [(self.kept, "kept"), (self.spares, "spare"), (new, "new")]
        which = ", ".join(f"{count} {what}" for count, what in parts if count)
        return (
            f"{self.error}: at step {self.step}; went on from step {self.resumed_step} ({self.source}) with "
            f"{self.workers} worker(s) ({which}) after {self.seconds:.1f} s, {self.replayed_batches} batches replayed"
        )


def snapshot_due(every: int | float | str | None, seconds: float, steps: int, cost: float | None) -> bool:
    """Whether to take an in-memory snapshot.

    Args:
        every: An int counts steps, a float seconds; "auto": as often as costs less than a hundredth of the time, and
            not within 2 s, the first two not within 10 s; None: never.
        seconds: Since the latest snapshot.
        steps: Since the latest snapshot.
        cost: Seconds that training was blocked by the latest one; None: that is not known yet.
    """
    if every is None:
        return False
    if isinstance(every, str):
        # handing the copy over beside training costs about as much again
        return seconds >= (10.0 if cost is None else max(2.0, 250.0 * cost))
    return steps >= every if isinstance(every, int) else seconds >= every
