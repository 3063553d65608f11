"""SIGUSR1 tells where every rank is, also those of a run that hangs; the run goes on."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.plan.where_it_is import folded

__all__ = ["AskedWhere"]

log = logging.getLogger("raytrainer")

#: None where the system has no such signal.
_ASKED: signal.Signals | None = getattr(signal, "SIGUSR1", None)
#: Seconds that workers get to answer.
_PATIENCE = 15.0


class AskedWhere:
    """While entered, SIGUSR1 to this process logs a line for each rank.

    A run in this process also has the stacks of its threads written to stderr at once, by C code: the lines are
    Python's, and are not to be had while a thread holds its lock.

    Does nothing outside the main thread, on systems without that signal, or where the program has a handler of its own.

    Args:
        group: The workers of the moment; None: there are none yet.
        in_process: Whether the run is in this process.
    """

    def __init__(self, group: Callable[[], WorkerGroup | None], in_process: bool) -> None:
        self._group, self._in_process = group, in_process
        self._process = os.getpid()
        self._dumps = False
        # a thread that is there already, since the handler must not wait for one to start: it would be seen to
        self._thread: threading.Thread | None = None
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __enter__(self) -> AskedWhere:
        main = threading.current_thread() is threading.main_thread()
        if _ASKED is not None and main and signal.getsignal(_ASKED) is signal.SIG_DFL:
            self._thread = threading.Thread(target=self._answer, name="raytrainer-where", daemon=True)
            self._thread.start()
            signal.signal(_ASKED, self._asked)
            if self._in_process and sys.__stderr__ is not None:
                with contextlib.suppress(OSError, ValueError):  # a stderr that is no file
                    faulthandler.register(_ASKED, file=sys.__stderr__, all_threads=True, chain=True)
                    self._dumps = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _ASKED is None or self._thread is None:
            return
        if self._dumps:
            faulthandler.unregister(_ASKED)
        signal.signal(_ASKED, signal.SIG_DFL)
        self._requests.put(False)
        self._thread.join(_PATIENCE)
        self._thread, self._dumps = None, False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # rather than one that a loader has forked
            self._requests.put(True)

    def _answer(self) -> None:
        while self._requests.get():
            group = self._group()
            try:
                lines = [] if group is None else folded(group.whereabouts(_PATIENCE))
            except Exception as error:  # they are being given back, say
                lines = [f"not to be found out: {error}"]
            log.warning("Asked where the run is:\n%s", "\n".join(lines) or "it has no workers yet, or no longer")
