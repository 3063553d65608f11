"""The user's own modules that have changed on the disk since workers imported them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from raytrainer.worker.actor.own_modules import Stamp, stamp_of, stamps

__all__ = ["EditedModules"]

log = logging.getLogger("raytrainer")


class EditedModules:
    """Of one group of workers: the modules as they may have imported them.

    Attributes:
        stamps: A file's time and size, by its path.
    """

    def __init__(self) -> None:
        self.stamps: dict[str, Stamp] = {}

    def note(self) -> None:
        """A run begins, whose workers import what it needs, unless they have before."""
        self.stamps = {**stamps(), **self.stamps}

    def learn(self, imported: Mapping[str, Stamp]) -> None:
        """What a worker on this machine has imported, as it ended its run: in a step, say, but not in this process."""
        self.stamps = {**imported, **self.stamps}

    def outdated(self, shipped: bool) -> bool:
        """Whether the workers have to start anew. Files that are gone do not count.

        Args:
            shipped: Whether they import from a copy, which they would get again; that is only said.
        """
        edited = sorted(path for path, stamp in self.stamps.items() if stamp_of(path) not in (stamp, None))
        files = ", ".join(edited)
        if edited and shipped:
            log.warning("Workers have a copy of what has been edited since: %s. ray.shutdown() sends it anew.", files)
            self.stamps |= {path: stamp for path in edited if (stamp := stamp_of(path)) is not None}
        elif edited:
            log.info("Workers start anew, since they may have imported what has been edited: %s.", files)
        return bool(edited) and not shipped
