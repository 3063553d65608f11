"""A checksum that is formed in the pass that reads or writes the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import xxhash

__all__ = ["NAME", "RunningChecksum"]

#: How checksums begin.
NAME = "xxh3_128:"


class RunningChecksum:
    """Of all that has come so far, and of parts of it."""

    def __init__(self) -> None:
        self._digests = [xxhash.xxh3_128()]

    def update(self, data: memoryview) -> None:
        """Hash what comes next."""
        for digest in self._digests:
            digest.update(data)

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
