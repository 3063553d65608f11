"""The user's own modules that have changed on the disk since workers imported them."""

from __future__ import annotations

import functools
import logging
import os
import site
import sys
import sysconfig

__all__ = ["EditedModules"]

log = logging.getLogger("raytrainer")

_INSTALLED = tuple(
    {os.path.realpath(path) + os.sep for path in (*sysconfig.get_paths().values(), *site.getsitepackages()) if path}
)


class EditedModules:
    """Of one group of workers: the modules as they may have imported them.

    Attributes:
        stamps: A file's time and size, by its path.
    """

    def __init__(self) -> None:
        self.stamps: dict[str, tuple[int, int]] = {}

    def note(self) -> None:
        """A run begins, whose workers import what it needs, unless they have before."""
        self.stamps = {**_stamps(), **self.stamps}

    def outdated(self, shipped: bool) -> bool:
        """Whether the workers have to start anew. Files that are gone do not count.

        Args:
            shipped: Whether they import from a copy, which they would get again; that is only said.
        """
        edited = sorted(path for path, stamp in self.stamps.items() if _stamp(path) not in (stamp, None))
        files = ", ".join(edited)
        if edited and shipped:
            log.warning("Workers have a copy of what has been edited since: %s. ray.shutdown() sends it anew.", files)
            self.stamps |= {path: stamp for path in edited if (stamp := _stamp(path)) is not None}
        elif edited:
            log.info("Workers start anew, since they may have imported what has been edited: %s.", files)
        return bool(edited) and not shipped


def _stamps() -> dict[str, tuple[int, int]]:
    """Of all modules in this process that are neither the library's nor installed."""
    files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name != "__main__"}
    own = {path for path in files if path and not _installed(path)}
    return {path: stamp for path in own if (stamp := _stamp(path)) is not None}


@functools.cache  # to follow links takes 0.1 s for all modules of a process
def _installed(path: str) -> bool:
    return os.path.realpath(path).startswith(_INSTALLED)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
