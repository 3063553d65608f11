"""Ctrl-C and SIGTERM while a run is on.

Ctrl-C once asks for a stop at the next boundary, twice aborts; before training, and while the run ends, once aborts
what is going on. SIGTERM while a `fit` trains leaves it some time to save the step that it is in; otherwise it ends the
run at once. In both cases in order, and the process with status 143.

`driver/run.py` enters it for each run; `Coordinator` says when training has begun.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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

    SIGTERM sets `requested` too while there is something `to_save`, and raises SystemExit when `grace` is over. Others
    of its kind, which whoever ends whole groups of processes sends, change nothing.

    Does nothing outside the main thread, or where somebody has installed a handler of their own.

    Args:
        grace: Seconds from SIGTERM until what is to be saved has to be; 0: nothing is.
        give_up: Called from a thread of its own when they are over, before that is raised.

    Attributes:
        requested: Whether the run is to stop at the next boundary.
        terminated: Whether SIGTERM has come, so that the process is to end.
        overdue: Whether the time for saving is over.
        to_save: Whether there is something that has been trained, and no checkpoint of it; the coordinator says so.
    """

    def __init__(self, grace: float = 0.0, give_up: Callable[[], object] = lambda: None) -> None:
        self.requested = self.terminated = self.overdue = self.to_save = False
        self._grace, self._give_up, self._terminated_at = grace, give_up, 0.0
        self._timer: threading.Timer | None = None
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
        self.stop_clock()
        while self._previous:
            number, handler = self._previous.popitem()
            # the default ends the process at once: one that uses Ray by now has to end that first
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
        elif self.overdue and self._timer is not None:
            self._timer = None
            self._raise(terminate())
        elif not self.terminated:
            self.terminated, self._terminated_at = True, time.monotonic()
            if not self._grace or not self.to_save or self._at_once or self._ending:
                log.warning("SIGTERM: ending the run; checkpoints that have been announced are written first.")
                self._raise(terminate())
                return
            self.requested = True
            self._timer = threading.Timer(self._grace, self._time_is_over)
            self._timer.daemon = True
            self._timer.start()
            log.warning(
                "SIGTERM: saving a checkpoint after the batches, or the hook, in progress, within %.3g s "
                "(preemption_grace). If this process is killed before that, the newest checkpoint is the one before.",
                self._grace,
            )

    def _time_is_over(self) -> None:
        """In a thread of its own: have the handler called once more, in the main thread."""
        self.overdue = True
        self._give_up()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def stop_clock(self) -> None:
        """What was to be saved is, or cannot be: nothing is interrupted any more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    @property
    def since(self) -> float:
        """Seconds since SIGTERM."""
        return time.monotonic() - self._terminated_at

    def _raise(self, error: BaseException) -> None:
        if self._ending or not self._raised:
            self._raised = True
            raise error
