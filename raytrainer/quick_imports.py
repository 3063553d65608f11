"""`importing`: a search for garbage finds none among what is being imported, and takes a quarter of the time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["importing"]


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage in here, where much is imported that stays: torch, or what its first optimizer brings along.

    Python would look through all of it again and again as it grows: 800 times, 0.7 s of 3 for torch, Ray and an
    optimizer. What is imported may itself say how garbage is to be looked for (`gc.disable()` at the head of a script,
    `gc.set_threshold`), and that is left as it then is.
    """
    first, *others = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield
    finally:
        if gc.get_threshold()[0] == 0:
            gc.set_threshold(first, *others)
