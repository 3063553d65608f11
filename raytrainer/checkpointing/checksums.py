"""Checksums: of a file while it is written, and of a JSON document within itself; `checked_reader.py` compares them.

They tell of damage: flipped bits, lost ends, files of other checkpoints. They are no signature; who can change a file
can change its checksum too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import xxhash

from raytrainer.checkpointing.running_checksum import NAME, RunningChecksum
from raytrainer.errors import GivenUpError
from raytrainer.signals import hear

__all__ = [
    "CHECKSUM",
    "ChecksummedWriter",
    "FileRecord",
    "Sink",
    "seal",
    "unseal",
]

#: What a checksum looks like.
CHECKSUM = NAME + "[0-9a-f]{32}"

#: Bytes that are hashed and written at a time. After each the thread that writes may have to wait for the
#: interpreter's lock, which training holds, so that they are not few.
_PIECE = 4 * 2**20

_BLANK = NAME + "0" * 32


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> Any:
        """Take bytes, all of them."""


@dataclass(frozen=True)
class FileRecord:
    """What a checkpoint's `meta.json` says of one of its files: its size, and the checksum of its content.

    Without a checksum it is a file of the format's first version.
    """

    bytes: int
    checksum: str | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> FileRecord | None:
        """None: this is no such record."""
        try:
            record = cls(**value)
        except TypeError:
            return None
        sized = type(record.bytes) is int and record.bytes >= 0
        summed = isinstance(record.checksum, str) and re.fullmatch(CHECKSUM, record.checksum)
        return record if sized and summed else None


class ChecksummedWriter:
    """A writable file that passes everything on to `sink`, and forms its checksum.

    A failure is kept, what comes later is dropped, and `record` raises it: torch's own writer, which is given this
    object, would tell of another failure instead of the first one.

    Args:
        sink: Where it goes.
        given_up: Asked for each piece, whether to leave it at that, which is such a failure: GivenUpError.
    """

    def __init__(self, sink: Sink, given_up: Callable[[], bool] | None = None) -> None:
        self._sink, self._given_up, self._sums = sink, given_up, RunningChecksum()
        self.bytes = 0
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Pass on bytes; returns how many."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._pass_on(view)
            except BaseException as error:
                self._error = error
        return len(view)

    def _pass_on(self, view: memoryview) -> None:
        for start in range(0, len(view), _PIECE):
            hear()
            if self._given_up is not None and self._given_up():
                raise GivenUpError(f"a checkpoint has been given up after {self.bytes:,} bytes.")
            piece = view[start : start + _PIECE]
            self._sums.update(piece)
            self._sink.write(piece)
            self.bytes += len(piece)

    def write_part(self, data: Any) -> FileRecord:
        """Pass on bytes; returns what is to be known of these alone."""
        with self._sums.part() as text:
            size = self.write(data)
            return FileRecord(size, text())

    def flush(self) -> None:
        """Writers ask for this; the file is flushed when it is closed."""

    def record(self) -> FileRecord:
        """Of what has been written; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return FileRecord(self.bytes, self._sums.text())


def seal(document: Mapping[str, Any]) -> bytes:
    """A JSON document with its own checksum as the last entry, for `unseal`."""
    blank = json.dumps({**document, "checksum": _BLANK}, indent=2).encode()
    return _put(blank, NAME + xxhash.xxh3_128(blank).hexdigest())


def unseal(data: bytes) -> dict[str, Any] | None:
    """The document that `seal` has written; None: not a byte of it may be trusted."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    checksum = document.pop("checksum", None) if isinstance(document, dict) else None
    if not isinstance(checksum, str) or len(checksum) != len(_BLANK) or data.count(checksum.encode()) != 1:
        return None
    blank = data.replace(checksum.encode(), _BLANK.encode())
    return document if NAME + xxhash.xxh3_128(blank).hexdigest() == checksum else None


def _put(blank: bytes, checksum: str) -> bytes:
    head, _, tail = blank.rpartition(_BLANK.encode())
    return head + checksum.encode() + tail
