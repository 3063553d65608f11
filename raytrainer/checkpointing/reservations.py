"""Names of checkpoints to be written: taken, not only looked up, so that two processes get different ones.

A reserved name is a folder that this process has locked. The lock ends with the process, so that what a killed one had
reserved, or begun to write, is free again.

Remote filesystems have no locks. There a reserved name is a folder with a small file of this process's. Who finds
another one's beside its own, once it has written that, gives way: of two at the same moment one does, or both. What a
killed process has left there counts for some hours.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import ExitStack, suppress
from threading import Lock

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checkpoint_meta import META
from raytrainer.checkpointing.checksums import seal, unseal
from raytrainer.checkpointing.places import folder_at
from raytrainer.errors import ConfigurationError

__all__ = ["release", "require_writable", "reserve"]

_held: dict[str, ExitStack] = {}
_guard = Lock()

_MARKER = re.compile(r"reserved-[0-9a-f]{12}\.json")

#: Seconds for which a remote name that somebody has reserved is taken: longer than any checkpoint is written for.
_KEPT = 6 * 3600.0


def reserve(path: str) -> bool:
    """Take a name for a checkpoint, until it has been written, or `release`.

    Where no folder can be made (a full disk, a name that is too long) nothing is reserved: who writes there is told.

    Returns:
        False: it is taken, by a file, folder or link of anybody's.
    """
    try:
        return _reserved_remotely(path) if _is_remote(path) else _reserved(path)
    except OSError:
        return True


def _reserved(path: str) -> bool:
    folder = folder_at(path)
    os.makedirs(os.path.dirname(folder.path), exist_ok=True)
    try:
        os.mkdir(folder.path)
        made = True
    except FileExistsError:
        made = False
    with _guard, ExitStack() as stack:
        if folder.path in _held or folder.storage.is_link(folder.path) or not os.path.isdir(folder.path):
            return False
        locked = stack.enter_context(folder.storage.locked(folder.path))
        # a folder that was made here may be another process's by now; where there are no locks, it is ours
        if locked is False or (locked is None and not made):
            return False
        if locked:
            folder.delete_leftovers()
        if os.listdir(folder.path):
            return False
        _held[folder.path] = stack.pop_all()
    return True


def _reserved_remotely(path: str) -> bool:
    folder = folder_at(path)
    storage, name = folder.storage, f"reserved-{uuid.uuid4().hex[:12]}.json"
    with _guard, ExitStack() as stack:
        if folder.path in _held or _is_taken(folder, ""):
            return False
        content = seal({"reserved": name, "at": time.time()})
        stack.callback(_forget, folder, name)
        try:
            _put(folder, name, content)
        except FileNotFoundError:  # of a filesystem that has folders
            storage.make_folder(folder.path)
            _put(folder, name, content)
        if _is_taken(folder, name):
            stack.pop_all()
            _withdraw(folder, name)
            return False
        _held[folder.path] = stack.pop_all()
    return True


def _put(folder: CheckpointFolder, name: str, content: bytes) -> None:
    with folder.storage.create(folder.inside(name)) as file:
        file.write(content)


def _withdraw(folder: CheckpointFolder, name: str) -> None:
    """Leave the folder, which is somebody else's now: object stores remove one with what has come into it meanwhile."""
    with suppress(OSError):
        folder.storage.delete(folder.inside(name))


def _forget(folder: CheckpointFolder, name: str) -> None:
    _withdraw(folder, name)
    with suppress(OSError):
        folder.storage.remove_folder(folder.path)


def _is_taken(folder: CheckpointFolder, own: str) -> bool:
    """Whether there is a checkpoint, or somebody else is about to write one."""
    names = folder.storage.files(folder.path)
    others = [name for name in names if name != own and _MARKER.fullmatch(name)]
    return META in names or any([_counts(folder, name) for name in others])


def _counts(folder: CheckpointFolder, name: str) -> bool:
    """Whether a reservation is to be respected; one that is older goes."""
    try:
        found = unseal(folder.storage.read(folder.inside(name)))
    except FileNotFoundError:  # given up meanwhile
        return False
    if found is None or type(found.get("at")) is not float or time.time() - found["at"] < _KEPT:
        return True
    _withdraw(folder, name)
    return False


def release(path: str) -> None:
    """Give up a name that was reserved, if it was; its folder goes if nothing was written."""
    folder = folder_at(path)
    with _guard:
        stack = _held.pop(folder.path, None)
        if stack is not None:
            with stack:
                if folder.storage.is_local:
                    folder.storage.remove_folder(folder.path)


def _is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file:")


def require_writable(path: str, whose: str) -> None:
    """Make a folder for checkpoints, if need be, and find out whether it can be written to.

    Raises:
        ConfigurationError: It cannot; names it and `whose` it is.
    """
    try:
        folder = folder_at(path)
        folder.storage.make_folder(folder.path)
        if folder.storage.is_local and not os.access(folder.path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise ConfigurationError(
            f"{whose}: {path} cannot be written to: {error}. Give another folder, or make it writable."
        ) from error
