"""Looks, while the driver waits for answers, whether workers wait for each other for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from raytrainer.errors import DisagreementError
from raytrainer.plan.standstill import LOOKS, Look, standstill
from raytrainer.plan.where_it_is import Whereabouts

__all__ = ["StandstillWatch"]

#: Seconds without all answers after which it is first looked, and between looks; of a second's work that is for long.
_FIRST, _EVERY = 15.0, 10.0

#: Longer waits are looked at less often: after so much more of the time that they have taken, and for each worker so
#: many seconds.
_LATER, _EACH = 0.25, 0.05

#: Gives what has been asked for, once it is there.
Asked: TypeAlias = Callable[[], Sequence[Whereabouts] | None]


class StandstillWatch:
    """Of one wait for all workers' answers.

    Args:
        ask: Asks all workers where they are, without waiting for their answers.
    """

    def __init__(self, ask: Callable[[], Asked]) -> None:
        self._ask = ask
        self._began = time.monotonic()
        self._next = self._began + _FIRST
        self._looks: list[Look] = []
        self._asked: Asked | None = None
        self._answered: frozenset[int] = frozenset()
        self._at = 0.0

    def look(self, answered: Collection[int]) -> None:
        """To be called now and then, with the ranks that have answered.

        Raises:
            DisagreementError: Workers wait for each other.
        """
        now = time.monotonic()
        if self._asked is None:
            if now >= self._next:
                self._at, self._answered, self._asked = now, frozenset(answered), self._ask()
            return
        found = self._asked()
        if found is None:
            return
        self._asked = None
        self._looks = [*self._looks, Look(self._at, self._answered, found)][-LOOKS:]
        self._next = self._at + max(_EVERY, _LATER * (now - self._began), _EACH * len(found))
        text = standstill(self._looks)
        if text is not None:
            raise DisagreementError(text)
