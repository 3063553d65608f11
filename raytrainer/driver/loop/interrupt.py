"""Ctrl-C while a run is on: once asks for a stop at the next boundary, twice aborts; before training, once aborts.

`driver/run.py` enters it for each run; `Coordinator` says when training has begun.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupt"]

log = logging.getLogger("raytrainer")


class Interrupt:
    """While entered, the first SIGINT sets `requested`; the second raises KeyboardInterrupt, and so ends each wait.

    Within `at_once` the first one does: where there is no boundary soon, and nothing that would be lost.

    Does nothing outside the main thread, or where somebody has installed a handler of their own.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self.requested = False
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    @contextmanager
    def at_once(self, when: bool = True) -> Iterator[None]:
        """Inside, Ctrl-C raises KeyboardInterrupt (`when` there is nothing to lose), since a set-up may take long.

        Used by `Coordinator._setup`. Waiting for other workers after some were lost is not inside.
        """
        self._at_once = when
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._at_once:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("Interrupted: stopping at the next boundary, within about a second. Once more to abort at once.")
