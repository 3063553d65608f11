"""The user's own modules that a process has imported: neither the library's nor installed ones."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig

__all__ = ["CHANGED", "Stamp", "stamp_of", "stamps"]

#: A file's time in nanoseconds, and its size.
Stamp = tuple[int, int]

#: Stands for a file that may have changed since it was imported: equal to no other.
CHANGED: Stamp = (-1, -1)

_INSTALLED = tuple(
    {os.path.realpath(path) + os.sep for path in (*sysconfig.get_paths().values(), *site.getsitepackages()) if path}
)


def stamps(since: int | None = None) -> dict[str, Stamp]:
    """Of all such modules in this process, by the file's path.

    Args:
        since: Files that were written later, in nanoseconds, are `CHANGED`: when they were imported nobody knows.
    """
    files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name != "__main__"}
    found = {path: stamp_of(path) for path in files if path and not _installed(path)}
    late = since if since is not None else float("inf")
    return {path: stamp if stamp[0] < late else CHANGED for path, stamp in found.items() if stamp is not None}


@functools.cache
def _installed(path: str) -> bool:
    if os.path.islink(path):
        return os.path.realpath(path).startswith(_INSTALLED)
    return (_folder(os.path.dirname(path)) + os.sep).startswith(_INSTALLED)


@functools.cache  # to follow links takes 0.1 s for all files that a process has imported, and 0.01 s for their folders
def _folder(path: str) -> str:
    return os.path.realpath(path)


def stamp_of(path: str) -> Stamp | None:
    """None: there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
