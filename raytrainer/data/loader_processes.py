"""Processes that are forked leave their parent's garbage alone."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

__all__ = ["garbage_left_alone"]

_asked = 0
_paused = False  # the parent's collector, while it forks


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Processes that are forked meanwhile do not collect what was garbage in this one.

    Collected there, it may hang or crash: an old process group's destructor waits for threads that a fork has not.
    """
    global _asked
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1


def _before() -> None:
    global _paused
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
    _resume()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_resume, after_in_child=_in_child)
