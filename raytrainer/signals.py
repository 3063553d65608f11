"""When Ctrl-C and SIGTERM act: never while something is being taken or given back, but in waits and in user code.

A handler may raise between any two bytecodes. Inside a `shield` it waits: for `hear`, which every wait calls at least
once in `PIECE` seconds; for `exposed`, around user code; or for the shield's end. Signals are a matter of the process's
main thread; in others all of this does nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = [
    "PIECE",
    "ends_process",
    "exit_in_order",
    "exposed",
    "hear",
    "shield",
    "sigterm_kept",
    "terminate",
    "wait_until",
]

#: Seconds after which a wait calls `hear` again.
PIECE = 0.25

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_before: dict[int, Callable[[int, FrameType | None], Any]] | None = None  # the handlers, while there is a shield
_noted: list[int] = []  # what has come meanwhile
_exposed = False


def _note(number: int, frame: FrameType | None) -> None:
    global _exposed
    _noted.append(number)
    if _exposed:
        _exposed = False  # before it raises, so that no other one interrupts the way out
        _deliver()
        _exposed = True


def _deliver() -> None:
    """Call the handlers that are in force outside of the shield."""
    while _noted and _before is not None:
        number = _noted.pop(0)
        _before[number](number, None)


@contextmanager
def shield() -> Iterator[None]:
    """Inside, no signal's handler raises. One within another does nothing."""
    global _before
    if _before is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
    _before = before
    try:
        for number in before:
            signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _before = None
        while _noted:
            came = _noted.pop(0)
            before[came](came, None)


@contextmanager
def exposed() -> Iterator[None]:
    """Within a shield: user code, which signals may interrupt."""
    global _exposed
    if _before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _deliver()
    _exposed = True
    try:
        yield
    finally:
        _exposed = False


def hear() -> None:
    """Have the handlers called of what a shield has noted; they may raise."""
    if _before is not None and threading.current_thread() is threading.main_thread():
        _deliver()


def wait_until(done: Callable[[float], bool], seconds: float) -> bool:
    """Wait for something, and hear signals meanwhile.

    Args:
        done: Waits for at most so many seconds; whether it has come.
        seconds: In all.
    """
    deadline = time.monotonic() + seconds
    while not done(max(0.0, min(PIECE, deadline - time.monotonic()))):
        hear()
        if time.monotonic() >= deadline:
            return False
    return True


# ---------------------------------------------------------------- SIGTERM


def terminate() -> SystemExit:
    """What ends the process as SIGTERM should: with status 143, but in order."""
    return SystemExit(128 + signal.SIGTERM)


def ends_process(handler: Any) -> bool:
    """Whether a handler of SIGTERM but ends the process: Python's default, ours, or Ray's.

    `ray.init` puts Ray's in the place of any other. It calls `sys.exit(15)`, and has the process aborted three seconds
    later, whatever it may be doing by then.
    """
    rays = str(getattr(handler, "__module__", "")).partition(".")[0] == "ray"
    return rays or handler in (None, signal.SIG_DFL, exit_in_order)


def exit_in_order(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM that lets `atexit` do its work: end Ray, say."""
    raise terminate()


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Around a start of Ray: SIGTERM does afterwards what it did before, or ends the process in order.

    Once a handler is set from here, Ray's three seconds do not begin.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if ends_process(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, exit_in_order if ends_process(before) else before)
