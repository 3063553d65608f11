"""Names of checkpoints to be written: taken, not only looked up, so that two processes get different ones.

A reserved name is a folder that this process has locked. The lock ends with the process, so that what a killed one had
reserved, or begun to write, is free again. On remote filesystems, which have no such thing, nothing is reserved.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from threading import Lock

from raytrainer.checkpointing.places import folder_at
from raytrainer.errors import ConfigurationError

__all__ = ["release", "require_writable", "reserve"]

_held: dict[str, ExitStack] = {}
_guard = Lock()


def reserve(path: str) -> bool:
    """Take a name for a checkpoint, until it has been written, or `release`.

    Where no folder can be made (a full disk, a name that is too long) nothing is reserved: who writes there is told.

    Returns:
        False: it is taken, by a file, folder or link of anybody's.
    """
    if _is_remote(path):
        return True
    try:
        return _reserved(path)
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


def release(path: str) -> None:
    """Give up a name that was reserved, if it was; its folder goes if nothing was written."""
    if _is_remote(path):
        return
    folder = folder_at(path)
    with _guard:
        stack = _held.pop(folder.path, None)
        if stack is not None:
            with stack:
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
