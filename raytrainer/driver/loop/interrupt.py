"""Ctrl-C and SIGTERM while a run is on.

Ctrl-C once asks for a stop at the next boundary, twice aborts; before training, and while the run ends, once aborts
what is going on. SIGTERM ends the run at once, in order, and the process with status 143.

`driver/run.py` enters it for each run; `Coordinator` says when training has begun.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from raytrainer.signals import ends_process, exit_in_order, terminate

__all__ = ["Interrupt"]

log = logging.getLogger("raytrainer")


class Interrupt:
    """While entered, the first SIGINT sets `requested`; the second raises KeyboardInterrupt, and so ends each wait.

    Within `at_once` the first one does: where there is no boundary soon, and nothing that would be lost. What has been
    raised is not raised again before `begin_end`, so that the way to the end is not interrupted in turn.

    Does nothing outside the main thread, or where somebody has installed a handler of their own.

    Attributes:
        requested: Whether the run is to stop at the next boundary.
        terminated: Whether SIGTERM has come, so that the process is to end.
    """

    def __init__(self) -> None:
        self.requested = self.terminated = False
        self._at_once = self._raised = self._ending = False
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if ends_process(signal.getsignal(signal.SIGTERM)):
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # a process that has come to use Ray meanwhile has more to end than SIGTERM's default would
            uses_ray = "ray" in sys.modules and sys.modules["ray"].is_initialized()
            signal.signal(number, exit_in_order if uses_ray and handler is signal.SIG_DFL else handler)

    @contextmanager
    def at_once(self, when: bool = True) -> Iterator[None]:
        """Inside, Ctrl-C raises KeyboardInterrupt (`when` there is nothing to lose): what goes on may take long."""
        before, self._at_once = self._at_once, when
        try:
            yield
        finally:
            self._at_once = before

    def begin_end(self) -> None:
        """From here on each signal ends the step of the end that it comes in, and only that."""
        self._ending = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that somebody has forked
            raise KeyboardInterrupt
        if self.requested or self._at_once or self._ending:
            self._raise(KeyboardInterrupt())
        else:
            self.requested = True
            log.warning(
                "Interrupted: stopping after the batches, or the hook, in progress. Once more to abort at once."
            )

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.terminated:
            self.terminated = True
            log.warning("SIGTERM: ending the run; checkpoints that have been announced are written first.")
            self._raise(terminate())

    def _raise(self, error: BaseException) -> None:
        if self._ending or not self._raised:
            self._raised = True
            raise error
