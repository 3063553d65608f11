"""`importing`: a search for garbage finds none among what is being imported, and takes a quarter of the time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["end_importing", "importing"]

_before: list[tuple[int, int, int]] = []  # how garbage was looked for before each `importing` that goes on


@contextlib.contextmanager
def importing(alone: bool = False) -> Iterator[None]:
    """Look for no garbage in here, where much is imported that stays: torch, or what its first optimizer brings along.

    Python would look through all of it again and again as it grows: 800 times, 0.7 s of 3 for torch, Ray and an
    optimizer. What is imported may itself say how garbage is to be looked for (`gc.disable()` at the head of a script,
    `gc.set_threshold`), and that is left as it then is.

    Args:
        alone: Nothing but imports is in here. Then the search that is due afterwards leaves them out too, which would
            take 0.08 s for torch: they are counted among what has long been there.
    """
    before = gc.get_threshold()
    alone = alone and gc.isenabled() and before[0] != 0
    if alone:
        gc.collect(1)  # of others' garbage, which is little, nothing is to be counted so
    _before.append(before)
    gc.set_threshold(0)
    try:
        yield
    finally:
        if alone and gc.get_freeze_count() == 0:  # what somebody has frozen would be thawed
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        _search(_before.pop())


def end_importing() -> None:
    """Within `importing`: a wait follows that may be long, and garbage is looked for again."""
    if _before:
        _search(_before[0])


def _search(thresholds: tuple[int, int, int]) -> None:
    if gc.get_threshold()[0] == 0:
        gc.set_threshold(*thresholds)
