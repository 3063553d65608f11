"""Tracebacks that show the user's own lines: those of this package, of torch's inside and of Ray are left out."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from raytrainer.errors import RaytrainerError, WorkerError

__all__ = ["FULL", "HINT", "fold", "folds_tracebacks"]

P = ParamSpec("P")
R = TypeVar("R")

#: Set to 1, it shows every frame.
FULL = "RAYTRAINER_FULL_TRACEBACK"

#: Said below an error of which frames have been left out.
HINT = f"{FULL}=1 shows the frames of raytrainer and torch too."

#: Packages between the user's call and the user's code, beside this one.
BETWEEN = ("torch", "ray")

OWN = str(Path(__file__).parent) + os.sep


def fold(error: BaseException) -> None:
    """Leave frames that are not the user's out of an error's traceback, and of those that it came from.

    The last frame stays, which says where it was raised; of errors that this package raises on purpose not even that.
    An error that no code of the user's has a part in is one of this package: it keeps all its frames.
    """
    if os.environ.get(FULL) == "1":
        return
    hidden = 0
    for each in _chain(error):
        frames = list(_frames(each.__traceback__))
        inner = [_is_inner(frame) for frame in frames]
        # of a worker's error its cause has the user's lines
        on_purpose = isinstance(each, RaytrainerError) or isinstance(each.__cause__, WorkerError)
        # and one of a loader's process has them in its message
        on_purpose = on_purpose or (str(each).startswith("Caught ") and "Original Traceback" in str(each))
        if not frames or (all(inner) and not on_purpose):
            continue
        kept = [frame for frame, skip in zip(frames, inner, strict=True) if not skip]
        if inner[-1] and not on_purpose:
            kept.append(frames[-1])
        hidden += len(frames) - len(kept)
        each.__traceback__ = _linked(kept)
    if hidden and not isinstance(error, RaytrainerError) and HINT not in getattr(error, "__notes__", ()):
        error.add_note(HINT)


def folds_tracebacks(verb: Callable[P, R]) -> Callable[P, R]:
    """A method that the user calls, whose errors are folded on their way out."""

    @functools.wraps(verb)
    def calling(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except BaseException as error:
            with contextlib.suppress(Exception):  # an error that cannot be changed is shown as it is
                fold(error)
            raise

    return calling


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, None if each.__suppress_context__ else each.__context__]


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_inner(traceback: TracebackType) -> bool:
    path = traceback.tb_frame.f_code.co_filename
    if path.startswith((OWN, "<frozen", contextlib.__file__, functools.__file__)):
        return True
    return path.startswith(_between())


@functools.cache
def _folder(package: str) -> str | None:
    module = sys.modules.get(package)
    return None if module is None or module.__file__ is None else os.path.dirname(module.__file__) + os.sep


def _between() -> tuple[str, ...]:
    return tuple(folder for folder in map(_folder, filter(sys.modules.__contains__, BETWEEN)) if folder is not None)


def _linked(frames: list[TracebackType]) -> TracebackType | None:
    made: TracebackType | None = None
    for frame in reversed(frames):
        made = TracebackType(made, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return made
