"""Batches that are None, as from a `collate_fn` that drops what it cannot read: they are skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

__all__ = ["MissingBatches", "unless_missing"]

log = logging.getLogger("raytrainer")


class MissingBatches:
    """Says once that a stage's loader gives None, and where workers must do the same, sees to that.

    Args:
        stage: As in "the train loader".
        agree: Whether a flag is true on every worker; None where a worker can skip a batch alone.
    """

    def __init__(self, stage: str, agree: Callable[[bool], bool] | None = None) -> None:
        self.stage, self.agree = stage, agree
        self._said = False

    def checked(self, batch: Any) -> Any:
        """The batch, or None if it is to be skipped; every worker asks for each batch."""
        if batch is None:
            self._say("is None")
        if self.agree is not None and not self.agree(batch is not None) and batch is not None:
            self._say("is None on another worker, and this step needs all of them")
            return None
        return batch

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "A batch of the %s loader %s: it is skipped, as all further ones will be. If its collate_fn drops "
                "samples on purpose, all is well.", self.stage, what,
            )  # fmt: skip


def unless_missing(step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
    """`step`, which is not called for a batch that is None, and has no output then."""
    return lambda batch, batch_idx, loader_idx: None if batch is None else step(batch, batch_idx, loader_idx)
