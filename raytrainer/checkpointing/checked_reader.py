"""Files that are read and compared, in one pass, with the checksum that is known of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

from raytrainer.checkpointing.checksums import FileRecord
from raytrainer.checkpointing.running_checksum import NAME, RunningChecksum
from raytrainer.errors import CheckpointError
from raytrainer.signals import hear

__all__ = ["CheckedReader", "check_file", "checked_pieces"]

#: Bytes between two reads that are read for the checksum alone, as soon as they are passed over. A reader that goes
#: further is one that comes back.
_GAP = 2**20

#: Bytes that are read from a disk, and hashed, at a time: they are still in a core's cache then, so that hashing takes
#: a tenth of the time that reading them has taken, and the disk reads ahead meanwhile.
_PIECE = 2**18

#: Bytes that are asked of a service, or read of a shard beside other threads, at a time.
_FAR_PIECE = 4 * 2**20


def check_file(file: BinaryIO, record: FileRecord, name: str, into: memoryview | None = None) -> None:
    """Read a file, from where it stands, and compare it with what is known of it.

    Args:
        file: Where to read from.
        record: Its size, which the caller has compared, and checksum when it was written.
        name: Path or URI, for messages.
        into: Where to keep the content, of the record's size; None: it is dropped.

    Raises:
        CheckpointError: They differ.
    """
    sums, size = RunningChecksum(), record.bytes
    done = _skim(file, size, sums) if into is None else _fill(file, into[:size], sums, _FAR_PIECE)
    _compare(done, sums, record, name)


def checked_pieces(file: BinaryIO, record: FileRecord, name: str) -> Iterator[memoryview]:
    """As `check_file`, piece by piece: each is in the same memory as the one before, and the end gives the verdict."""
    sums, done = RunningChecksum(), 0
    scratch = memoryview(bytearray(min(_FAR_PIECE, record.bytes)))
    while done < record.bytes:
        count = _fill(file, scratch[: record.bytes - done], sums, _PIECE)
        if not count:
            break
        yield scratch[:count]
        done += count
    _compare(done, sums, record, name)


class CheckedReader(io.RawIOBase):
    """A file of a checkpoint that is compared while the `with` block reads it; the block's end gives the verdict.

    The bytes that the block gets are the ones that are hashed, as long as it reads them in their order, which torch
    does. What it leaves out, or had before its turn, is read at the end. If the block fails as well, the damage is the
    reason that is told; before it comes what has stopped the reading itself, Ctrl-C say, of which torch may make
    another error on its way through C++.

    Args:
        file: From its beginning.
        record: See `check_file`.
        name: See `check_file`.

    Raises:
        CheckpointError: They differ.
        OSError: The file cannot be read.
    """

    def __init__(self, file: BinaryIO, record: FileRecord, name: str) -> None:
        self._file, self._record, self._name = file, record, name
        self._sums = RunningChecksum()
        self._at = self._hashed = 0  # where the block is, and up to where all has been hashed
        self._stopped: BaseException | None = None  # what has stopped the reading

    def __enter__(self) -> CheckedReader:  # type: ignore[override]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stopped is not None:
            if error is not self._stopped:
                raise self._stopped from None
        elif error is None or isinstance(error, Exception):
            self._file.seek(self._hashed)
            rest = _skim(self._file, self._record.bytes - self._hashed, self._sums)
            try:
                _compare(self._hashed + rest, self._sums, self._record, self._name)
            except CheckpointError as damage:
                raise damage from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._record.bytes)[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        try:
            return self._read_into(buffer)
        except BaseException as error:
            self._stopped = error
            raise

    def _read_into(self, buffer: Any) -> int:
        begin = self._at
        if 0 < begin - self._hashed <= _GAP:
            self._file.seek(self._hashed)
            self._hashed += _skim(self._file, begin - self._hashed, self._sums)
        self._file.seek(begin)
        view = memoryview(buffer).cast("B")
        self._at += _fill(self._file, view, self._sums if begin == self._hashed else None, _PIECE)
        if begin == self._hashed:
            self._hashed = self._at
        return self._at - begin


def _skim(file: BinaryIO, size: int, sums: RunningChecksum) -> int:
    """Hash so many bytes and drop them. Returns how many there were."""
    scratch, done = memoryview(bytearray(min(_PIECE, size))), 0
    while done < size:
        hear()
        count = _read(file, scratch[: size - done])
        if not count:
            break
        sums.update(scratch[:count])
        done += count
    return done


def _fill(file: BinaryIO, into: memoryview, sums: RunningChecksum | None, piece: int) -> int:
    """Read as many bytes as there is room for, so many at a time, and hash them. Returns how many there were."""
    done = 0
    while done < len(into):
        hear()
        count = _read(file, into[done : done + piece])
        if not count:
            break
        if sums is not None:
            sums.update(into[done : done + count])
        done += count
    return done


def _read(file: BinaryIO, into: memoryview) -> int:
    return int(file.readinto(into) or 0)  # type: ignore[attr-defined]


def _compare(done: int, sums: RunningChecksum, record: FileRecord, name: str) -> None:
    if done < record.bytes:
        raise CheckpointError(
            f"{name}: the file ends after {done} of {record.bytes} bytes: it is truncated; use another checkpoint."
        )
    found = sums.text()
    if record.checksum is not None and found != record.checksum:
        raise CheckpointError(
            f"{name}: the file is damaged: its content is not what was written (checksum {found.removeprefix(NAME)} "
            f"instead of {record.checksum.removeprefix(NAME)}); use another checkpoint."
        )
