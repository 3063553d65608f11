"""Files that are replaced whole: after a kill, a power cut or on a full disk there is the old or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["NewFile", "beside", "replaced", "sync_folder"]


class NewFile:
    """A file that is written beside another one, whose place it is to take.

    Attributes:
        target: The other one, be it there or not.
        path: Where to write.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        # a name that is short enough wherever the target's is
        self.path = target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex[:12]}")

    def sync(self) -> None:
        """Have its content on the disk."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def take_place(self) -> None:
        """Become the target, in one move, with the permissions of a file that was there. Its content is on the disk."""
        if self.target.exists():
            shutil.copymode(self.target, self.path)
        os.replace(self.path, self.target)
        sync_folder(self.target.parent)


@contextmanager
def beside(target: Path) -> Iterator[NewFile]:
    """A new file for `target`, within the block; what has not taken its place by the end is deleted."""
    new = NewFile(target)
    try:
        yield new
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what is told
            new.path.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A new text file to be written, which takes the place of `path` at the end of the block, if that does not fail.

    Args:
        path: What links lead to is what is replaced; a file that was there keeps its permissions.
        newline: As for `open`.
    """
    with beside(path.resolve()) as new:
        with new.path.open("x", newline=newline) as file:
            yield file
        new.sync()
        new.take_place()


def sync_folder(path: str | Path) -> None:
    """Have on the disk which files are in a folder, by which names."""
    if os.name == "nt":  # folders need no such call there, and take none
        return
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # one may write to a folder that one may not read
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # nor on some filesystems
            raise
    finally:
        os.close(folder)
