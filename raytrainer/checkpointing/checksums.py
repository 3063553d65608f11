"""Checksums: of a file while it is written and before it is used, and of a JSON document within itself.

They tell of damage: flipped bits, lost ends, files of other checkpoints. They are no signature; who can change a file
can change its checksum too.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol

import xxhash

from raytrainer.errors import CheckpointError, GivenUpError

__all__ = [
    "CHECKSUM",
    "LARGE",
    "ChecksummedWriter",
    "FileRecord",
    "Sink",
    "check_file",
    "checked_beside",
    "seal",
    "unseal",
]

#: Bytes of a file from which on another thread is worth its start.
LARGE = 8 * 2**20

#: Hashed and written in pieces that stay in a core's cache, so that memory is read once for both.
_PIECE = 4 * 2**20

_NAME = "xxh3_128:"
#: What a checksum looks like.
CHECKSUM = _NAME + "[0-9a-f]{32}"
_BLANK = _NAME + "0" * 32


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
    """A writable file that passes everything on to `sink`, and forms its checksum beside.

    A failure is kept, what comes later is dropped, and `record` raises it: torch's own writer, which is given this
    object, would tell of another failure instead of the first one.

    Args:
        sink: Where it goes.
        given_up: Asked for each piece, whether to leave it at that, which is such a failure: GivenUpError.
    """

    def __init__(self, sink: Sink, given_up: Callable[[], bool] | None = None) -> None:
        self._sink, self._hash, self._given_up = sink, xxhash.xxh3_128(), given_up
        self.bytes = 0
        self._error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Pass on bytes; returns how many."""
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                for start in range(0, len(view), _PIECE):
                    if self._given_up is not None and self._given_up():
                        raise GivenUpError(f"a checkpoint has been given up after {self.bytes:,} bytes.")
                    piece = view[start : start + _PIECE]
                    self._hash.update(piece)
                    self._sink.write(piece)
                    self.bytes += len(piece)
            except BaseException as error:
                self._error = error
        return len(view)

    def flush(self) -> None:
        """Writers ask for this; the file is flushed when it is closed."""

    def record(self) -> FileRecord:
        """Of what has been written; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return FileRecord(self.bytes, _NAME + self._hash.hexdigest())


def check_file(file: BinaryIO, record: FileRecord, name: str, into: memoryview | None = None) -> None:
    """Read a file, and compare it with what is known of it.

    Args:
        file: Where to read from.
        record: Its size, which the caller has compared, and checksum when it was written.
        name: Path or URI, for messages.
        into: Where to keep the content, of the record's size; None: it is dropped.

    Raises:
        CheckpointError: They differ.
    """
    digest, scratch, done = xxhash.xxh3_128(), memoryview(bytearray(_PIECE)), 0
    while done < record.bytes:
        size = min(_PIECE, record.bytes - done)
        piece = scratch[:size] if into is None else into[done : done + size]
        count = file.readinto(piece)  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(piece[:count])
        done += count
    if done < record.bytes:
        raise CheckpointError(
            f"{name}: the file ends after {done} of {record.bytes} bytes: it is truncated; use another checkpoint."
        )
    if record.checksum is not None and _NAME + digest.hexdigest() != record.checksum:
        raise CheckpointError(
            f"{name}: the file is damaged: its content is not what was written (checksum {digest.hexdigest()} instead "
            f"of {record.checksum.removeprefix(_NAME)}); use another checkpoint."
        )


@contextmanager
def checked_beside(open_again: Callable[[], BinaryIO], record: FileRecord, name: str) -> Iterator[None]:
    """Compare a file with what is known of it, in a thread, while the block reads it too.

    The end of the block waits for the verdict. If the block fails as well, the damage is the reason that is told.

    Args:
        open_again: Opens it.
        record: See `check_file`.
        name: See `check_file`.

    Raises:
        CheckpointError: They differ.
        OSError: The file cannot be read.
    """
    found: list[Exception] = []

    def check() -> None:
        try:
            with open_again() as file:
                check_file(file, record, name)
        except Exception as error:
            found.append(error)

    # a daemon: after Ctrl-C nobody waits for it
    thread = threading.Thread(target=check, name="checkpoint-check", daemon=True)
    thread.start()
    try:
        yield
    except Exception:
        thread.join()
        if found:
            raise found[0] from None
        raise
    thread.join()
    if found:
        raise found[0]


def seal(document: Mapping[str, Any]) -> bytes:
    """A JSON document with its own checksum as the last entry, for `unseal`."""
    blank = json.dumps({**document, "checksum": _BLANK}, indent=2).encode()
    return _put(blank, _NAME + xxhash.xxh3_128(blank).hexdigest())


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
    return document if _NAME + xxhash.xxh3_128(blank).hexdigest() == checksum else None


def _put(blank: bytes, checksum: str) -> bytes:
    head, _, tail = blank.rpartition(_BLANK.encode())
    return head + checksum.encode() + tail
