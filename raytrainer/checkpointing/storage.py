"""`Storage`: what checkpoints ask of a filesystem, and nothing more; on local disks and on what pyarrow knows by URI.

Local files are on the disk, not only in memory, when the calls below return that say so. On remote filesystems a file
that was closed is as durable as their service makes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from raytrainer.checkpointing.checksums import Sink
from raytrainer.replaced_file import sync_folder

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = ["ArrowStorage", "LocalStorage", "Storage"]

#: Bytes.
_ASK_EVERY = 8 * 2**20

#: What a disk says that has not kept something.
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


class Storage(ABC):
    """Files and folders; paths are absolute, with "/" between their parts."""

    #: Whether reading a file twice costs little.
    is_local: bool

    @abstractmethod
    def make_folder(self, path: str) -> None:
        """Make it and those above it, where they are missing.

        Raises:
            OSError: It cannot be made, a file of this name included.
        """

    @abstractmethod
    def create(self, path: str) -> AbstractContextManager[Sink]:
        """A new file to be written. At the end of the block its content is durable; after a failure it is gone."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A file to be read. Raises FileNotFoundError, and what else keeps it from being read as OSError."""

    @abstractmethod
    def replace(self, path: str, target: str) -> None:
        """Rename a file, in one move, over one that may be there."""

    @abstractmethod
    def sync_folder(self, path: str) -> None:
        """Make durable which files are in the folder, by which names."""

    @abstractmethod
    def files(self, path: str) -> list[str]:
        """Names of what is in a folder, folders included; [] where there is none."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def remove_folder(self, path: str) -> None:
        """Remove a folder, if it is empty."""

    def is_link(self, path: str) -> bool:
        """Whether it leads to a file or folder that is somewhere else, be it there or not."""
        return False

    @abstractmethod
    def free_bytes(self, path: str) -> int | None:
        """How much more can be written there; None: nobody knows."""

    def locked(self, path: str) -> AbstractContextManager[bool | None]:
        """Whether, for the length of the block, nobody else has this file or folder locked. Never waits.

        False also where it is gone. None where locks are not to be had, so that nobody knows.
        """
        return contextlib.nullcontext(None)

    def read(self, path: str) -> bytes:
        """A small file's content."""
        with self.open(path) as file:
            return file.read()


class _OnItsWay:
    """A file that the disk is asked to take while more is written, so that fsync finds little left to wait for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._asked, self._end = file, 0, 0

    def write(self, data: Any) -> None:
        self._file.write(data)
        self._end += memoryview(data).nbytes
        if self._end - self._asked >= _ASK_EVERY:
            self.flush()
            with contextlib.suppress(OSError, AttributeError):  # what is no such file; other systems than Linux
                # of pages that are dirty, as these are, Linux begins to write and drops none
                os.posix_fadvise(self._file.fileno(), self._asked, self._end - self._asked, os.POSIX_FADV_DONTNEED)
            self._asked = self._end

    def flush(self) -> None:
        self._file.flush()


class LocalStorage(Storage):
    """A filesystem of this machine, network mounts included."""

    is_local = True

    def make_folder(self, path: str) -> None:
        try:
            os.makedirs(path, exist_ok=True)
        except FileExistsError:
            if os.path.lexists(path):  # or somebody has removed it just now, as who writes there will find out
                raise
        # which of these are new is not known here: names may have been reserved before
        while (parent := os.path.dirname(path)) != path:
            try:
                self.sync_folder(parent)
            except OSError as error:
                if error.errno in _LOST:
                    raise
                return  # a folder above may be one that we may not read
            path = parent

    @contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        file = open(path, "xb")  # noqa: SIM115
        try:
            with file:
                yield _OnItsWay(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong before is what is told
                self.delete(path)
            raise

    def open(self, path: str) -> BinaryIO:
        file = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )  # no waiting for pipes
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return open(file, "rb", buffering=0)

    def replace(self, path: str, target: str) -> None:
        os.replace(path, target)

    def sync_folder(self, path: str) -> None:
        sync_folder(path)

    def files(self, path: str) -> list[str]:
        try:
            return os.listdir(path)
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def remove_folder(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(path)

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def free_bytes(self, path: str) -> int | None:
        try:
            found = os.statvfs(path)
        except (OSError, AttributeError):
            return None
        return found.f_bavail * found.f_frsize

    @contextmanager
    def locked(self, path: str) -> Iterator[bool | None]:
        got: bool | None
        with contextlib.ExitStack() as stack:
            try:
                import fcntl

                opened = os.open(path, os.O_RDONLY)
                stack.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # closing is not enough: a process that was forked meanwhile has it too
                stack.callback(fcntl.flock, opened, fcntl.LOCK_UN)
                got = os.path.samestat(os.fstat(opened), os.stat(path))  # or it is another one by now
            except (BlockingIOError, FileNotFoundError):
                got = False
            except (ImportError, OSError):  # Windows; some network filesystems
                got = None
            yield got


class ArrowStorage(Storage):
    """A filesystem of pyarrow's. Its services publish a file when it is closed."""

    is_local = False

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem

    def make_folder(self, path: str) -> None:
        self._filesystem.create_dir(path, recursive=True)

    @contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        try:
            with self._filesystem.open_output_stream(path) as stream:
                yield stream
        except BaseException:
            with contextlib.suppress(OSError):
                self.delete(path)
            raise

    def open(self, path: str) -> BinaryIO:
        file: Any = self._filesystem.open_input_file(path)
        return file  # type: ignore[no-any-return]

    def replace(self, path: str, target: str) -> None:
        self._filesystem.move(path, target)

    def sync_folder(self, path: str) -> None:
        pass

    def files(self, path: str) -> list[str]:
        from pyarrow import fs

        selector = fs.FileSelector(path, allow_not_found=True)
        return [entry.base_name for entry in self._filesystem.get_file_info(selector)]

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(path)

    def remove_folder(self, path: str) -> None:
        if not self.files(path):
            with contextlib.suppress(OSError):
                self._filesystem.delete_dir(path)

    def free_bytes(self, path: str) -> int | None:
        return None
