"""Where checkpoints are: a local path, a URI of any filesystem that pyarrow knows, or an object of Ray's."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable
from urllib.parse import quote

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checkpoint_meta import META, is_own_name, is_readable, written_by_us
from raytrainer.checkpointing.storage import ArrowStorage, LocalStorage
from raytrainer.errors import ConfigurationError
from raytrainer.plan.uris import absolute, is_inside, is_web, split_query

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "CheckpointPath",
    "RayCheckpoint",
    "checkpoint_exists",
    "find_checkpoints",
    "folder_at",
    "is_file",
    "is_link",
    "lies_in",
    "locate",
    "newest_checkpoint",
    "remove_checkpoint",
    "same_place",
    "written_at",
]


@runtime_checkable
class RayCheckpoint(Protocol):
    """A `ray.tune.Checkpoint` or `ray.train.Checkpoint`: a directory somewhere."""

    def as_directory(self) -> AbstractContextManager[str]:
        """A local copy, or the directory itself if it is local."""


#: Names of folders that checkpoints are in.
_MADE_BY_US = re.compile(r"version_\d+|checkpoints")

#: Where a checkpoint is: a path, a URI, or one of Ray's own objects.
CheckpointPath: TypeAlias = str | os.PathLike[str] | RayCheckpoint


def locate(path: str | Path) -> tuple[FileSystem, str]:
    """The filesystem of a path or URI, and the path on it.

    Raises:
        ConfigurationError: A URI of a kind that pyarrow has no filesystem for.
    """
    from pyarrow import ArrowInvalid, fs

    text = str(path)
    if "://" in text:
        base, query = split_query(text)
        # pyarrow refuses what URIs must escape, such as spaces, and undoes the escapes
        try:
            filesystem, inner = fs.FileSystem.from_uri(quote(base, safe=":/@[]%=+,;~") + query)
        except ArrowInvalid as error:
            web = " A file on the web: fetch it first, torch.hub.download_url_to_file(url, path)." * is_web(text)
            raise ConfigurationError(
                f"{text}: pyarrow cannot open this address ({error}). Checkpoints may be on local paths and at s3://, "
                f"gs://, abfss:// and hdfs://.{web}"
            ) from error
        return filesystem, inner.rstrip("/")
    return fs.LocalFileSystem(), absolute(text)


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


def is_link(path: str) -> bool:
    """Whether a local path leads to a checkpoint, or whatever it is, somewhere else. URIs have no links."""
    return "://" not in path and os.path.islink(path.rstrip("/"))


def same_place(one: str, other: str) -> bool:
    """Whether two paths or URIs lead to the same folder, links followed."""
    if "://" in one or "://" in other:
        return one == other
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def lies_in(path: str, folder: str) -> bool:
    """Whether a path or URI is below a folder, links followed."""
    if "://" in path or "://" in folder:
        return is_inside(path, folder)
    return is_inside(*(os.path.realpath(os.path.expanduser(found)) for found in (path, folder)))


def written_at(path: str) -> float | None:
    """When the checkpoint there was written, in seconds; None: there is none, of anybody's."""
    filesystem, directory = locate(path)
    moment = filesystem.get_file_info(f"{directory}/{META}").mtime_ns
    return None if moment is None else float(moment) / 1e9


def checkpoint_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is one of this package's checkpoints."""
    folder = folder_at(path)
    try:
        return written_by_us(folder.storage.read(folder.inside(META)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        if folder.storage.is_local:  # what cannot be read, is no file, or has too long a name
            return False
        raise


def find_checkpoints(root: str | Path) -> list[tuple[float, str]]:
    """(time of writing in seconds, path) of every checkpoint in a directory tree, damaged ones included."""
    return [(moment, path) for moment, path in _candidates(root) if _is_checkpoint(path)]


def newest_checkpoint(roots: Iterable[str | Path]) -> str | None:
    """The path of the checkpoint that was written last, damaged ones included, in one of several directory trees."""
    candidates = sorted((found for root in roots for found in _candidates(root)), reverse=True)
    return next((path for _, path in candidates if _is_checkpoint(path)), None)


def _is_checkpoint(path: str) -> bool:
    """Whether a folder with a `meta.json` is one of this package's, or was before it was damaged."""
    folder = folder_at(path)
    try:
        data = folder.storage.read(folder.inside(META))
    except OSError:
        return False
    if written_by_us(data):
        return True
    # where meta.json can no longer be read, the names of the other files tell
    return not is_readable(data) and any(is_own_name(name) for name in folder.storage.files(folder.path))


def _candidates(root: str | Path) -> list[tuple[float, str]]:
    """Folders with a `meta.json` of anybody's, and when it was written.

    Links are not followed, but for folders that this package has made and somebody has moved: of a version, of its
    checkpoints, and single ones.
    """
    from pyarrow import fs

    filesystem, directory = locate(root)
    found: list[tuple[float, str]] = []
    if isinstance(filesystem, fs.LocalFileSystem):  # pyarrow would follow links, and end at what may not be read
        top = os.path.realpath(directory)
        seen, roots = {top}, [directory]
        while roots:
            for path, folders, files in os.walk(roots.pop()):
                if META in files:
                    with contextlib.suppress(OSError):
                        about = os.stat(f"{path}/{META}")
                        if stat.S_ISREG(about.st_mode):
                            found.append((about.st_mtime, path))
                for link in (f"{path}/{name}" for name in folders if os.path.islink(f"{path}/{name}")):
                    real = os.path.realpath(link)
                    moved = _MADE_BY_US.fullmatch(os.path.basename(link)) or os.path.isfile(f"{link}/{META}")
                    # what is inside is found by itself; what this is inside of holds other people's
                    if moved and real not in seen and not is_inside(real, top) and not is_inside(top, real):
                        seen.add(real)
                        roots.append(link)
        return found
    base, query = split_query(str(root))
    base = base.rstrip("/")
    entries = filesystem.get_file_info(fs.FileSelector(directory, allow_not_found=True, recursive=True))
    return [
        (entry.mtime_ns / 1e9, base + entry.path.removesuffix(f"/{META}").removeprefix(directory) + query)
        for entry in entries
        if entry.base_name == META and entry.type == fs.FileType.File
    ]


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Delete a checkpoint, if it is there. What is not of this package is left as it is, and so is its folder."""
    folder_at(path).remove()
