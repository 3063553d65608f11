"""How far other workers are in a step, asked while their main threads may wait in a collective.

A worker that is about to do something else than in earlier steps waits for all others to come to the same. They follow
their records, and tell nothing. So each has a thread that answers: one that has gone on otherwise will never come.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Positions"]

#: Seconds between two looks for a question, and for an answer to it.
_LOOK_EVERY, _SOON = 0.5, 0.005

#: Seconds to wait for the answers to one question.
_PATIENCE = 3.0

#: The answer of a worker that has not come as far, and of one that has ended that step.
_BEHIND, _THROUGH = "behind", "through"

Word: TypeAlias = Callable[[int, int], str | None]


class Positions:
    """Asks, and has a thread that answers for as long as this object lives.

    Args:
        store: That all workers share. The thread has a connection of its own.
        name: Of its own in the store.
        rank: This worker's.
        size: How many workers there are.
        word: Its owner's method for what this worker has come to, by step and place in it: None if it has not come as
            far, "" if it has ended that step.
    """

    def __init__(self, store: Any, name: str, rank: int, size: int, word: weakref.WeakMethod[Word]) -> None:
        self._store, self._name, self._rank, self._size = store, name, rank, size
        self._word = word
        ended = threading.Event()
        weakref.finalize(self, ended.set)
        answering = threading.Thread(
            target=_answer, args=(weakref.ref(self), store.clone(), ended), name="raytrainer-positions", daemon=True
        )
        answering.start()

    def gone_on(self, step: int, place: int, word: str) -> tuple[int, str] | None:
        """A worker that has done something else in this place, and what: "" if it has ended the step; else None."""
        number = self._store.add(f"{self._name}/questions", 1)
        self._store.set(f"{self._name}/question/{number}", f"{step} {place}")
        waiting = {rank: f"{self._name}/answer/{number}/{rank}" for rank in range(self._size) if rank != self._rank}
        until = time.monotonic() + _PATIENCE
        while waiting and time.monotonic() < until:
            for rank, key in list(waiting.items()):
                if self._store.check([key]):
                    del waiting[rank]
                    answer = self._store.get(key).decode()
                    if answer not in (_BEHIND, word):
                        return rank, "" if answer == _THROUGH else answer
            time.sleep(_SOON)
        return None

    def answer(self, store: Any, number: int) -> None:
        """Answer a question."""
        step, place = map(int, store.get(f"{self._name}/question/{number}").decode().split())
        look = self._word()
        word = look(step, place) if look is not None else None
        text = _BEHIND if word is None else word or _THROUGH
        store.set(f"{self._name}/answer/{number}/{self._rank}", text)

    def asked(self, store: Any, number: int) -> bool:
        """Whether there is a question of this number."""
        return bool(store.check([f"{self._name}/question/{number}"]))


def _answer(positions: weakref.ref[Positions], store: Any, ended: threading.Event) -> None:
    """Until nobody is left who could be asked about."""
    number = 1
    while not ended.wait(_LOOK_EVERY):
        here = positions()
        if here is None:
            return
        try:
            while here.asked(store, number):
                here.answer(store, number)
                number += 1
        except RuntimeError:  # the store has gone with its worker
            return
        del here
