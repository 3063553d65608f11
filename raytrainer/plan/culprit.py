"""Whose failure it was: when one worker fails, others fail or hang because of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Failed", "choose_culprit", "is_consequence"]

_CONSEQUENCE_TYPES = frozenset(
    {"DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "SplitterLost", "AskerLost"}
)
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
