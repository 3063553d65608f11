"""`Keeper`: a process on each node that holds a copy of what another node's workers have, without torch."""

from __future__ import annotations

from collections import deque
from typing import Any

import ray

__all__ = ["Keeper"]

#: A worker may die before it has handed over its newest state, so that the one before is needed too.
KEPT = 2


class Keeper:
    """An actor's body: what it has asked Ray for stays in its node's shared memory as long as it is held."""

    def __init__(self) -> None:
        self._held: deque[Any] = deque(maxlen=KEPT)

    def hold(self, refs: list[Any]) -> None:
        """Have a copy of what these refer to, in place of the oldest of earlier ones."""
        self._held.append((refs, ray.get(refs)))
