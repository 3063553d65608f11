"""Main memory that outlives the process that fills it, as long as any process of the machine has it open.

A segment is a file without a name. Others open it by way of a process that has it open, and it is gone with the last of
them, however they end: nothing is left to be cleaned up. Without torch, as processes that only hold or write it do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "ALIGNED",
    "PIECE",
    "Handed",
    "Layout",
    "Segment",
    "SegmentBytes",
    "Stretch",
    "available_memory",
    "has_room",
    "lay_out",
    "new_segment",
]

#: Bytes that are made known to CUDA at once. While it takes 525 MB, training waits for 75 ms; for 32 MB, for nothing.
PIECE = 32 << 20

#: The part of a machine's memory that stays free beside a second state. Ray kills workers when there is little left.
MARGIN = 0.1

#: Tensors begin at multiples of so many bytes.
ALIGNED = 512


@dataclass(frozen=True)
class Segment:
    """A segment, as any process of its machine may open it.

    Attributes:
        name: No other segment's.
        size: Bytes.
        places: Processes that have it open, or may have it: pid and file descriptor; None: that is not known.
    """

    name: str
    size: int
    places: tuple[tuple[int, int | None], ...]

    def open(self) -> int:
        """A file descriptor of this process's own.

        Raises:
            OSError: None of the processes has it any more, or this one may not ask them, or is on another machine.
        """
        failed: OSError | None = None
        for pid, number in self.places:
            try:
                return self._open(f"/proc/{pid}/fd", number)
            except OSError as error:
                failed = error
        raise failed or FileNotFoundError(f"no process has {self.name} any more")

    def _open(self, folder: str, number: int | None) -> int:
        if number is None:
            number = next((int(n) for n in os.listdir(folder) if self._is_at(f"{folder}/{n}")), -1)
        found = os.open(f"{folder}/{number}", os.O_RDWR | os.O_CLOEXEC)
        # the number may be another file's by now, and the process another one's
        if self._is_at(f"/proc/self/fd/{found}") and os.fstat(found).st_size == self.size:
            return found
        os.close(found)
        raise FileNotFoundError(f"{folder}/{number} is something else than {self.name}")

    def _is_at(self, link: str) -> bool:
        try:
            return self.name in os.readlink(link)
        except OSError:
            return False

    def is_there(self) -> bool:
        """Whether this process could open it."""
        try:
            os.close(self.open())
        except OSError:
            return False
        return True

    def also_in(self, pid: int, number: int | None = None) -> Segment:
        """The same, which this process has too, or may have."""
        place = pid, number
        return replace(self, places=(*self.places, place) if number is None else (place, *self.places))


def new_segment(size: int) -> tuple[int, Segment]:
    """A segment of so many bytes, which this process has open: its file descriptor, and how others find it.

    Raises:
        OSError: The system has none.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"{sys.platform} has no memory that can be opened by way of another process")
    name = f"raytrainer-{uuid.uuid4().hex}"
    number = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(number, size)
    except OSError:
        os.close(number)
        raise
    return number, Segment(name, size, ((os.getpid(), number),))


@dataclass(frozen=True)
class SegmentBytes:
    """Some bytes of a segment; called, it gives them as they are there."""

    segment: Segment
    begin: int
    size: int

    def __call__(self) -> memoryview:
        """Raises OSError, see `Segment.open`."""
        if not self.size:
            return memoryview(b"")
        number = self.segment.open()
        try:
            before = self.begin % mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(number, before + self.size, access=mmap.ACCESS_READ, offset=self.begin - before)
        finally:
            os.close(number)
        return memoryview(mapping)[before:]

    def copied(self) -> bytearray:
        """A copy. Raises OSError, see `Segment.open`."""
        room = bytearray(self.size)
        self.read_into(memoryview(room))
        return room

    def read_into(self, room: memoryview) -> None:
        """Copy them. Raises OSError, see `Segment.open`."""
        number = self.segment.open()
        try:
            done = 0
            while done < self.size:
                count = os.preadv(number, [room[done : self.size]], self.begin + done)
                if count <= 0:
                    raise OSError(f"{self.segment.name} ends after {self.begin + done} bytes")
                done += count
        finally:
            os.close(number)


@dataclass(frozen=True)
class Stretch:
    """Bytes of a segment that CUDA knows as one. No copy may reach over the end of one."""

    begin: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where in a segment pieces lie.

    Attributes:
        at: By key: the first byte, and how many.
        stretches: A piece lies in one of them, or begins with one and lies in those that follow.
        size: Bytes, of all.
    """

    at: Mapping[str, tuple[int, int]]
    stretches: tuple[Stretch, ...]
    size: int

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether pieces of these sizes have their places here."""
        at = self.at
        return all(key in at and at[key][1] == size for key, size in sizes.items())


@dataclass(frozen=True)
class Handed:
    """What a process has put into a segment.

    Attributes:
        segment: It.
        layout: What lies where.
        room: Whether the machine has room for as much again, for all processes of the group.
    """

    segment: Segment
    layout: Layout
    room: bool = True

    def bytes_of(self, key: str) -> SegmentBytes:
        """Where a piece is."""
        return SegmentBytes(self.segment, *self.layout.at[key])


def lay_out(sizes: Mapping[str, int]) -> Layout:
    """Places for pieces of so many bytes, by their keys."""
    at: dict[str, tuple[int, int]] = {}
    stretches: list[Stretch] = []
    begin = end = 0
    for key, size in sizes.items():
        room = -(-size // ALIGNED) * ALIGNED
        if end > begin and end - begin + room > PIECE:
            stretches.append(Stretch(begin, end - begin))
            begin = end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE  # no page may be made known twice
        at[key] = end, size
        end += room
        while end - begin > PIECE:
            stretches.append(Stretch(begin, PIECE))
            begin += PIECE
    if end > begin:
        stretches.append(Stretch(begin, end - begin))
    return Layout(at, tuple(stretches), end)


def has_room(size: int) -> bool:
    """Whether so many bytes more may be taken. What a machine has left then, Ray is to be content with."""
    memory = available_memory()
    return memory is not None and memory[0] - size >= MARGIN * memory[1]


def available_memory(read: Callable[[str], str] = lambda path: Path(path).read_text()) -> tuple[int, int] | None:
    """Bytes of main memory that this process could still have, and that there are: the machine's, or its container's.

    None: the system does not tell.
    """
    found: list[tuple[int, int]] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in read("/proc/meminfo").splitlines() if ":" in line)
        found.append((_kilobytes(lines["MemAvailable"]), _kilobytes(lines["MemTotal"])))
    for folder, limit, used in _limits(read):
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = int(read(f"{folder}/{limit}"))  # "max", where there is none
            stat: dict[str, Any] = dict(line.split() for line in read(f"{folder}/memory.stat").splitlines())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # which the system would drop
            found.append((most - int(read(f"{folder}/{used}")) + cached, most))
    return min(found) if found else None


def _limits(read: Callable[[str], str]) -> list[tuple[str, str, str]]:
    """Where limits of this process's control groups may be: folder, and the names of limit and use."""
    root, found = "/sys/fs/cgroup", []
    with contextlib.suppress(OSError):
        for line in read("/proc/self/cgroup").splitlines():
            _, kinds, path = line.split(":", 2)
            names = ("memory.max", "memory.current")
            if "memory" in kinds.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            elif kinds:
                continue
            base = f"{root}/memory" if kinds else root
            parts = [part for part in path.split("/") if part]
            found += [("/".join([base, *parts[:count]]), *names) for count in range(len(parts), -1, -1)]
    return found


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) << 10
