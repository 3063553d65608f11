"""Whose failure it was: when one worker fails, others fail or hang because of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Failed", "Recovery", "choose_culprit", "is_consequence", "snapshot_due"]

_CONSEQUENCE_TYPES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "DistError"})
_CONSEQUENCE_WORDS = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "[gloo/",
    "/gloo/",
    "nccl error",
    "ncclremoteerror",
    "ncclsystemerror",
    "unhandled system error",
    "unhandled cuda error",
)


@dataclass(frozen=True)
class Failed:
    """One worker's failure: "lost" (process or node gone), or "raised" with the exception's type and message."""

    rank: int
    kind: str
    type_name: str = ""
    message: str = ""


def is_consequence(failure: Failed) -> bool:
    """Whether it looks like what a worker sees when another one is gone.

    gloo raises RuntimeError; a ConnectionResetError, say, is of a user's own connections.
    """
    if failure.kind == "lost":
        return False
    if failure.type_name in _CONSEQUENCE_TYPES:
        return True
    text = failure.message.lower()
    return failure.type_name == "RuntimeError" and any(word in text for word in _CONSEQUENCE_WORDS)


def choose_culprit(failures: Sequence[Failed]) -> Failed:
    """The failure to tell the user: an exception of user code, else a lost worker, else what there is."""

    def order(failure: Failed) -> tuple[int, int]:
        if failure.kind == "lost":
            return 1, failure.rank
        return (2 if is_consequence(failure) else 0), failure.rank

    return min(failures, key=order)


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
    """

    error: str
    step: int
    resumed_step: int
    replayed_batches: int
    seconds: float
    workers: int

    def __str__(self) -> str:
        return (
            f"{self.error}: at step {self.step}; went on from step {self.resumed_step} with {self.workers} worker(s) "
            f"after {self.seconds:.1f} s, {self.replayed_batches} batches replayed"
        )


def snapshot_due(every: int | float | str | None, seconds: float, steps: int, cost: float) -> bool:
    """Whether to take an in-memory snapshot.

    Args:
        every: An int counts steps, a float seconds; "auto": as often as costs less than a hundredth of the time, and
            not within 10 s; None: never.
        seconds: Since the latest snapshot.
        steps: Since the latest snapshot.
        cost: Seconds that training was blocked by the latest one.
    """
    if every is None:
        return False
    if isinstance(every, str):
        # handing the copy over beside training costs about as much again
        return seconds >= max(10.0, 250.0 * cost)
    return steps >= every if isinstance(every, int) else seconds >= every
