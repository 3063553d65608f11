"""A loader's processes begin, leave their parent's garbage, and Ctrl-C, alone, and end when it does."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

__all__ = ["control_c_left_alone", "garbage_left_alone", "sure_fork"]

#: Whether a fork may wait for ever for a lock that a thread of its parent's held (CPython's issue 112275): threads of
#: gloo's take it now and then after a collective, as they give up its tensors.
_MAY_NOT_BEGIN = sys.version_info < (3, 11, 10)

#: Seconds that a process is first given to begin; it has nothing to do until then but what Python does after forks.
_FIRST = 5.0

_asked = 0
_fork: Callable[[], int] | None = None  # that of `os`, while another one is in its place
_parent = 0  # the process that forks
_paused = False  # the parent's collector, while it forks


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Processes that are forked meanwhile begin, and do not collect what was garbage in this one.

    Collected there, it may hang or crash: an old process group's destructor waits for threads that a fork has not.
    """
    global _asked, _fork
    if _MAY_NOT_BEGIN and not _asked and hasattr(os, "fork"):
        _fork = os.fork
        os.fork = functools.partial(sure_fork, _fork)
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1
        if _fork is not None and not _asked:
            os.fork, _fork = _fork, None


def sure_fork(fork: Callable[[], int], patience: float = _FIRST) -> int:
    """`os.fork()`, but a process that does not come back from it is replaced.

    Args:
        fork: The real one.
        patience: Seconds to wait for the first one; for each further one twice as long, as the machine may be slow.
    """
    while True:
        reading, writing = os.pipe()
        child = fork()
        begun = child == 0
        try:
            if child == 0:
                os.write(writing, b".")
            else:
                begun = bool(wait([reading], patience))
        finally:
            os.close(reading)
            os.close(writing)
            if not begun:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if begun:
            return child
        patience *= 2


@contextlib.contextmanager
def control_c_left_alone(loader: Any) -> Iterator[None]:
    """Processes that are started meanwhile do not hear Ctrl-C, which a terminal sends to them too.

    It is this process that decides what Ctrl-C means: a loader whose process is gone would be an error before that.
    They inherit what is blocked here, by whichever way they are started; here it comes when this is over.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    context = getattr(loader, "multiprocessing_context", None) or multiprocessing
    if getattr(loader, "num_workers", 0) and context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # whose start, later, would unblock Ctrl-C again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _before() -> None:
    global _parent, _paused
    _parent = os.getpid()
    if _asked and gc.isenabled():
        _paused = True
        gc.disable()  # until the child has set aside what it inherits


def _resume() -> None:
    global _paused
    if _paused:
        _paused = False
        gc.enable()


def _in_child() -> None:
    if _asked:
        gc.freeze()
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                threading.Thread(target=_end_with, args=(os.pidfd_open(_parent),), daemon=True).start()
    _resume()


def _end_with(parent: int) -> None:
    """End this process as soon as its parent has.

    It has inherited the parent's connections: as long as one end of them is open, nobody hears that the parent is gone.
    torch looks every 5 s.
    """
    wait([parent])
    os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_resume, after_in_child=_in_child)
