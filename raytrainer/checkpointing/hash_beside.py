"""A checksum that is formed beside what is done with the bytes: a thread hashes while they are read or written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import xxhash

from raytrainer.signals import shield

__all__ = ["LARGE", "NAME", "PIECE", "HashBeside"]

#: Bytes from which on another thread is worth waking.
LARGE = 8 * 2**20

#: Bytes that are read, hashed and written at a time: they stay in a core's cache.
PIECE = 4 * 2**20

#: How checksums begin.
NAME = "xxh3_128:"


class HashBeside:
    """A checksum under way, until `close`.

    Large pieces are left to a thread, which starts with the first of them. Who must have them hashed takes over what
    the thread has not come to, so that one that gets no core, or could not be started, costs nothing but its help.
    """

    def __init__(self) -> None:
        self._digests = [xxhash.xxh3_128()]
        self._left: deque[memoryview] = deque()
        self._turn = threading.Lock()  # who has it takes the next piece, and hashes it
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._calls.put(False)

    def update(self, data: memoryview) -> None:
        """Hash what comes next, at once."""
        for digest in self._digests:
            digest.update(data)

    @contextmanager
    def beside(self, size: int) -> Iterator[Callable[[memoryview], None]]:
        """For a block that reads or writes so many bytes. It is given what takes them, to be hashed by its end.

        Until then they have to stay where and as they are. The block has to `hear` signals, as none interrupts it.
        """
        if size < LARGE:
            yield self.update
            return
        with shield():  # who is interrupted may free the memory that the thread is reading
            try:
                yield self._leave
            finally:
                self._hash_what_is_left()

    @contextmanager
    def part(self) -> Iterator[Callable[[], str]]:
        """Gives the checksum of what comes within the block, alone."""
        digest = xxhash.xxh3_128()
        self._digests.append(digest)
        try:
            yield lambda: NAME + digest.hexdigest()
        finally:
            self._digests.remove(digest)

    def text(self) -> str:
        """The checksum of all that has come."""
        return NAME + self._digests[0].hexdigest()

    def _leave(self, data: memoryview) -> None:
        self._left.extend(data[start : start + PIECE] for start in range(0, len(data), PIECE))
        if self._thread is None:
            # a daemon: after Ctrl-C nobody waits for it
            thread = threading.Thread(target=self._work, name="checkpoint-checksum", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # at the interpreter's end there are no new ones
                return
            self._thread = thread
        self._calls.put(True)

    def _work(self) -> None:
        while self._calls.get():
            self._hash_what_is_left()

    def _hash_what_is_left(self) -> None:
        while True:
            with self._turn:
                if not self._left:
                    return
                self.update(self._left.popleft())
