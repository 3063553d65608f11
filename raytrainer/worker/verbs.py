"""What a verb is: a method of `Worker` that the driver may call on every worker at once.

A verb is declared once, by `@verb(...)` on its method: the method's signature says what it takes and returns, the
decorator how long the driver waits for the answer. `WorkerGroup.call(Worker.train, ...)` is checked against that by
mypy, and both kinds of group, and the actor's body, derive from it. To add one, write the method; nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

__all__ = ["Verb", "Wait", "verb", "verb_of"]

F = TypeVar("F", bound=Callable[..., Any])

#: Seconds for code of the user's that may take long: preparing data, loading a model, a hook.
LONG = 24 * 3600.0

#: Seconds for what a worker that is well answers at once.
PROMPT = 60.0


class Wait(Enum):
    """How long the driver waits for a worker's answer before it counts as lost. Ctrl-C ends each wait."""

    TRAINING = "work whose length the driver chooses, so that silence for `hang_timeout` means a hang"
    USER_CODE = "set-up and hooks, which may take as long as a day"
    AT_ONCE = "what needs neither the device nor the user's code: a minute"

    def seconds(self, hang_timeout: float | None) -> float:
        """The limit, for a run with this `hang_timeout` (None: no run yet)."""
        if self is Wait.TRAINING and hang_timeout is not None:
            return hang_timeout
        return PROMPT if self is Wait.AT_ONCE else LONG


@dataclass(frozen=True)
class Verb:
    """A declared verb.

    Attributes:
        name: The method's.
        wait: How long the driver waits.
        takes_task: Its argument is the run's task, which a worker in another process has been sent already.
        shares: Its argument is large and the same for all workers: it is sent once, tensors in it packed.
    """

    name: str
    wait: Wait
    takes_task: bool = False
    shares: bool = False


def verb(wait: Wait, *, takes_task: bool = False, shares: bool = False) -> Callable[[F], F]:
    """Declare a method of `Worker` a verb."""

    def declare(method: F) -> F:
        method.__dict__["verb"] = Verb(method.__name__, wait, takes_task, shares)
        return method

    return declare


def verb_of(method: Callable[..., Any]) -> Verb:
    """The declaration of a verb.

    Raises:
        TypeError: The method is none.
    """
    found = getattr(method, "verb", None)
    if not isinstance(found, Verb):
        raise TypeError(f"{method!r} is no verb: declare it with @verb(...)")
    return found
