"""`Ending`: the steps of an end, of which each is taken, whatever another one raises."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raytrainer.signals import exposed

__all__ = ["Ending"]

log = logging.getLogger("raytrainer")


class Ending:
    """Keeps the first error, which is the one to tell; later ones get a line in the log.

    Attributes:
        error: The first.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Inside, whatever is raised is kept; `what` names it in the log."""
        try:
            yield
        except BaseException as error:
            if self.error is None:
                self.error = error
            elif error is not self.error:
                log.warning("%s failed as well: %s: %s", what, type(error).__name__, error)

    def tell(self) -> None:
        """Raise the first error, if there is one."""
        if self.error is not None:
            raise self.error

    @contextmanager
    def hook(self, what: str) -> Iterator[None]:
        """The same around the user's code, which Ctrl-C ends also where the rest of the end is shielded."""
        with self.step(what), exposed():
            yield
