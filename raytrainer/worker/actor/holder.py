"""`Holder`: a process on the workers' node that keeps their memory segments when they are killed; without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from raytrainer.memory_segments import Handed, Segment

__all__ = ["Holder"]


class Holder:
    """An actor's body. What it has open stays as long as it is there, or the workers are."""

    def __init__(self) -> None:
        self._open: dict[int, dict[str, int]] = {}  # by slot and name of the segment

    def probe(self, *segments: Segment | None) -> str | None:
        """Why it cannot have segments of the workers', of which these are samples; None: it can."""
        for segment in segments:
            if not isinstance(segment, Segment):
                return (
                    "the system has no memory that processes share by way of each other"
                    if segment is None
                    else str(segment)
                )
            try:
                os.close(segment.open())
            except OSError as error:
                return f"a process cannot open another one's memory: {error}"
        return None

    def hold(self, slot: int, pids: Sequence[int], *handed: Handed) -> list[Segment | None]:
        """Have what the workers have put into a slot, by rank, in place of what was there.

        Args:
            slot: Which.
            pids: The workers' processes. What a lost one has handed over, the one in its place may have.
            handed: Where it is.

        Returns:
            How to find it; None: it is gone.
        """
        before, now = self._open.get(slot, {}), dict[str, int]()
        found: list[Segment | None] = []
        for each, pid in zip(handed, pids, strict=True):
            segment = each.segment
            try:
                now[segment.name] = before[segment.name] if segment.name in before else segment.also_in(pid).open()
            except OSError:
                found.append(None)
            else:
                found.append(segment.also_in(os.getpid(), now[segment.name]))
        self._open[slot] = now
        _close([number for name, number in before.items() if name not in now])
        return found

    def keep(self, slots: Sequence[int]) -> None:
        """Let go of all others."""
        for slot in set(self._open).difference(slots):
            _close(list(self._open.pop(slot).values()))


def _close(numbers: Sequence[int]) -> None:
    for number in numbers:
        os.close(number)
