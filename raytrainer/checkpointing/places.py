"""Where checkpoints are: a local path, a URI of any filesystem that pyarrow knows, or an object of Ray's."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable
from urllib.parse import quote

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checkpoint_meta import META, written_by_us
from raytrainer.checkpointing.storage import ArrowStorage, LocalStorage
from raytrainer.plan.uris import split_query

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "CheckpointPath",
    "RayCheckpoint",
    "checkpoint_exists",
    "find_checkpoints",
    "folder_at",
    "is_file",
    "locate",
    "remove_checkpoint",
]


@runtime_checkable
class RayCheckpoint(Protocol):
    """A `ray.tune.Checkpoint` or `ray.train.Checkpoint`: a directory somewhere."""

    def as_directory(self) -> AbstractContextManager[str]:
        """A local copy, or the directory itself if it is local."""


#: Where a checkpoint is: a path, a URI, or one of Ray's own objects.
CheckpointPath: TypeAlias = str | os.PathLike[str] | RayCheckpoint


def locate(path: str | Path) -> tuple[FileSystem, str]:
    """The filesystem of a path or URI, and the path on it."""
    from pyarrow import fs

    text = str(path)
    if "://" in text:
        base, query = split_query(text)
        # pyarrow refuses what URIs must escape, such as spaces, and undoes the escapes
        filesystem, inner = fs.FileSystem.from_uri(quote(base, safe=":/@[]%=+,;~") + query)
        return filesystem, inner.rstrip("/")
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


def is_file(filesystem: FileSystem, path: str) -> bool:
    """Whether there is a file, rather than a directory or nothing."""
    from pyarrow import fs

    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def folder_at(path: str | os.PathLike[str]) -> CheckpointFolder:
    """The place of a checkpoint at a path or URI."""
    from pyarrow import fs

    filesystem, directory = locate(os.fspath(path))
    local = isinstance(filesystem, fs.LocalFileSystem)
    return CheckpointFolder(LocalStorage() if local else ArrowStorage(filesystem), directory, str(path))


def checkpoint_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is one of this package's checkpoints."""
    folder = folder_at(path)
    try:
        return written_by_us(folder.storage.read(folder.inside(META)))
    except (FileNotFoundError, NotADirectoryError):
        return False


def find_checkpoints(root: str | Path) -> list[tuple[float, str]]:
    """(time of writing in seconds, path) of every checkpoint in a directory tree, damaged ones included."""
    from pyarrow import fs

    filesystem, directory = locate(root)
    base, query = split_query(str(root))
    base = base.rstrip("/")
    entries = filesystem.get_file_info(fs.FileSelector(directory, allow_not_found=True, recursive=True))
    found = [
        (entry.mtime_ns / 1e9, base + entry.path.removesuffix("/meta.json").removeprefix(directory) + query)
        if "://" in base
        else (entry.mtime_ns / 1e9, entry.path.removesuffix("/meta.json"))
        for entry in entries
        if entry.base_name == META and entry.type == fs.FileType.File
    ]
    return [(moment, path) for moment, path in found if checkpoint_exists(path)]


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Delete a checkpoint, if it is there. What is not of this package is left as it is, and so is its folder."""
    folder_at(path).remove()
