"""A file of weights for other programs, put in place in one move, and never over a file of another kind."""

from __future__ import annotations

import json
import os
import uuid
import zipfile
from collections.abc import Callable

from raytrainer.checkpointing.storage import LocalStorage
from raytrainer.errors import CheckpointError

__all__ = ["put_in_place"]


def put_in_place(path: str, save: Callable[[str], object]) -> None:
    """Have a file of weights written beside `path`, and then take its place.

    Args:
        path: A local path. What is there may be replaced if it is a file of weights too.
        save: Writes a file of the name that it is given.

    Raises:
        CheckpointError: There is something else, or the file cannot be written; what was there is as it was.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.lexists(path) and not _holds_weights(path):
        raise CheckpointError(
            f"{path}: what is there holds no weights, and is not replaced; give another name, or delete it."
        )
    storage, folder = LocalStorage(), os.path.dirname(path)
    new = f"{folder}/.{os.path.basename(path)}.{uuid.uuid4().hex[:12]}"
    try:
        save(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        storage.replace(new, path)
        storage.sync_folder(folder)
    except Exception as error:
        written = os.path.getsize(new) if os.path.exists(new) else 0
        storage.delete(new)
        free = storage.free_bytes(folder)
        raise CheckpointError(
            f"{path}: the weights cannot be written: {error} ({written:,} bytes had been, and are removed again"
            + ("" if free is None else f"; {free:,} bytes are free now")
            + ")."
        ) from error


def _holds_weights(path: str) -> bool:
    """Whether a file was written by torch or by safetensors, as its first bytes, and a zip's names, tell."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) == 8 and head[:2] != b"PK" and 2 <= length <= 10**8 and file.peek(1)[:1] == b"{":
                return isinstance(json.loads(file.read(length)), dict)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        pass
    return False
