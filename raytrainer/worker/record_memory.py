"""The records of all ranks, in memory that they share and that outlives each of them."""

from __future__ import annotations

import mmap
import struct

from xxhash import xxh3_64

from raytrainer.plan.common_moment import Moment

__all__ = ["RecordMemory"]

#: Before a record: its checksum, the chunk, batches done in it, and its length.
_HEAD = struct.Struct("<Qqqq")


class RecordMemory:
    """Of each rank's records the last few are kept, in turn.

    Args:
        memory: That all have mapped.
        size: How many ranks.
        kept: How many records of each.
        room: Bytes for one record.
    """

    def __init__(self, memory: mmap.mmap, size: int, kept: int, room: int) -> None:
        self._memory, self.size, self._kept, self._room = memoryview(memory), size, kept, room

    @staticmethod
    def length(size: int, kept: int, room: int) -> int:
        """Bytes of memory for them."""
        return size * kept * (_HEAD.size + room) + 1

    @property
    def stopped(self) -> bool:
        """Whether any of them has said that it writes no more, so that nobody need."""
        return bool(self._memory[-1])

    def stop(self) -> None:
        """Say so."""
        self._memory[-1] = 1

    def _place(self, rank: int, turn: int) -> int:
        return (rank * self._kept + turn % self._kept) * (_HEAD.size + self._room)

    def write(self, rank: int, turn: int, moment: Moment, record: bytes) -> bool:
        """Whether there is room for it. Half of a record, or of a head, has another checksum."""
        if len(record) > self._room:
            return False
        at = self._place(rank, turn)
        self._memory[at + _HEAD.size : at + _HEAD.size + len(record)] = record
        self._memory[at : at + _HEAD.size] = _HEAD.pack(_checksum(moment, record), *moment, len(record))
        return True

    def read(self, rank: int) -> dict[Moment, bytes]:
        """The whole ones of a rank."""
        found = {}
        for turn in range(self._kept):
            at = self._place(rank, turn)
            checksum, chunk, batches, length = _HEAD.unpack(self._memory[at : at + _HEAD.size])
            if 0 < length <= self._room:
                record = bytes(self._memory[at + _HEAD.size : at + _HEAD.size + length])
                if checksum == _checksum((chunk, batches), record):
                    found[chunk, batches] = record
        return found


def _checksum(moment: Moment, record: bytes) -> int:
    digest = xxh3_64(_HEAD.pack(0, *moment, len(record)))
    digest.update(record)
    return digest.intdigest()
