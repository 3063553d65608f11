"""`StopBoard`: workers of one host that end a chunk after the same batch, though only one of them is asked to stop.

Memory that all of them map says how far each is, so that nobody has to be asked. A worker that is asked to stop names a
batch that none has begun. The others look there before each batch, which costs nothing that could be measured; a vote
over gloo, by whose threads it is counted, cost 5 % of small steps on two cores.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

from raytrainer.errors import RaytrainerError
from raytrainer.strategies.shared_memory import shared_memory

__all__ = ["AskerLost", "StopBoard"]

#: Seconds after which every processor sees what another one has written: it takes far less than a microsecond.
_VISIBLE = 0.001

#: Seconds to wait for who names the last batch, which takes it a few milliseconds; and between looks.
_PATIENCE, _LOOK_EVERY = 60.0, 0.0002

#: Numbers on the board are of a chunk, times this, and of a batch in it, so that each is written in one piece.
_CHUNK = 2**32

#: Where the chunk is whose workers are to stop, where its last batch is, whose process says so, and where the positions
#: of ranks begin: first of the batches that they have begun to read, then of those whose steps they have gone on to.
_ASKED, _LAST, _ASKER, _POSITIONS = 0, 1, 2, 3


class AskerLost(RaytrainerError):
    """The worker that was to name the last batch does not any more."""


class StopBoard:
    """A group's board, the same for all its runs.

    Args:
        store: That all workers share.
        rank: This worker's.
        size: How many they are.
        memory: That all have mapped.
    """

    def __init__(self, store: Any, rank: int, size: int, memory: mmap.mmap) -> None:
        self._store, self._own, self._size = store, _POSITIONS + rank, size
        self._board = memoryview(memory).cast("q")
        self._chunk = self._base = 0

    @classmethod
    def of_host(cls, store: Any, rank: int, size: int, control: Any) -> StopBoard | None:
        """A board of workers that can all map the same memory, else None. All make it together, over a gloo group."""
        memory = shared_memory(store, "raytrainer/stop/file", rank, 8 * (_POSITIONS + 2 * size), control)
        return None if memory is None else cls(store, rank, size, memory)

    def begin(self, chunk: int) -> None:
        """Another chunk begins here, of a higher number, the same on all workers, which have ended the one before."""
        self._chunk, self._base = chunk, chunk * _CHUNK

    def enter(self, index: int) -> int | None:
        """This worker begins a batch of the chunk, unless it is beyond the last, which is returned if there is one.

        Raises:
            AskerLost: Who is to name the last one does not.
        """
        board = self._board
        board[self._own] = self._base + index
        if board[_ASKED] != self._chunk:
            return None
        until = time.monotonic() + _PATIENCE
        while board[_LAST] // _CHUNK != self._chunk:
            if time.monotonic() > until or _has_ended(board[_ASKER]):
                if board[_LAST] // _CHUNK == self._chunk:  # the last thing that it has done
                    break
                raise AskerLost("another worker was asked to stop, and has not said after which batch")
            time.sleep(_LOOK_EVERY)
        return int(board[_LAST] % _CHUNK)

    def go_on(self) -> None:
        """This worker begins the step of the batch that it has entered."""
        self._board[self._own + self._size] = self._board[self._own]

    def gone_on(self) -> list[int]:
        """Ranks that have begun the step of the batch that this worker has entered, or a later one."""
        here, steps = self._board[self._own], _POSITIONS + self._size
        return [rank for rank in range(self._size) if self._board[steps + rank] >= here]

    def ask(self) -> None:
        """This worker is asked to stop, after the batch that it has entered."""
        if self._store.add(f"raytrainer/stop/{self._chunk}", 1) > 1:
            return  # another one was first, and names the batch
        board = self._board
        board[_ASKER] = os.getpid()
        board[_ASKED] = self._chunk
        # Who has not seen this, as it entered a batch at the same moment, has written by then which one that is.
        time.sleep(_VISIBLE)
        positions = [board[_POSITIONS + rank] for rank in range(self._size)]
        furthest = max(place % _CHUNK for place in positions if place // _CHUNK == self._chunk)
        board[_LAST] = self._chunk * _CHUNK + furthest + 1


def _has_ended(process: int) -> bool:
    """0: of one that is not known yet."""
    try:
        if process and os.name != "nt":  # where this is no question
            os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
