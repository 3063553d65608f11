"""`BatchWeight`: what a value counts for in an epoch's mean, since batches may differ in size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raytrainer.data.batch_size import batch_size_of, batch_sizes_in
from raytrainer.errors import MetricError

__all__ = ["BatchWeight"]

log = logging.getLogger("raytrainer")


class BatchWeight:
    """Samples in the batch that runs; looked for when first asked for.

    Args:
        tells: Whether this worker is the one to warn where they cannot be known.

    Attributes:
        batch: The batch that runs; None between batches.
    """

    def __init__(self, tells: bool) -> None:
        self.batch: Any = None
        self._tells = tells
        self._size: int | None = None
        self._whole: int | None = None  # samples in the node's batch, while a hook runs that sees all of it
        self._looked_at: set[str | None] = set()  # hooks whose first batch has been looked at closely

    def begin(self, batch: Any) -> None:
        self.batch, self._size = batch, None

    @contextmanager
    def whole_node(self, samples: int) -> Iterator[None]:
        """Inside, values are of a node's whole batch, and have that weight."""
        self._whole = samples
        try:
            yield
        finally:
            self._whole = None

    def samples(self, name: str, hook: str | None, mean: bool, given: Any = None) -> int:
        """The weight of a value of `name`; 1 where it cannot be known. Said once, if it is for a `mean`.

        Raises:
            MetricError: What was `given` for it is no weight.
        """
        if given is not None:
            return _checked(name, given)
        if self._whole is not None:
            return self._whole
        if self._size is None:
            known = batch_size_of(self.batch)
            if mean and self.batch is not None and hook not in self._looked_at:
                self._looked_at.add(hook)
                self._look_closely(known, name, hook)
            self._size = 1 if known is None else known
        return self._size

    def _look_closely(self, known: int | None, name: str, hook: str | None) -> None:
        if not self._tells:
            return
        kind, remedy = type(self.batch).__name__, f"self.log({name!r}, ..., batch_size=...)"
        if known is None:
            log.warning(
                "%s logs %r, but how many samples a batch (%s) has cannot be known: each counts as one in the epoch's "
                "mean, however many it has. Say it: %s.", hook, name, kind, remedy,
            )  # fmt: skip
            return
        others = sorted(set(batch_sizes_in(self.batch)) - {known})
        if others:
            log.warning(
                "%s logs %r of batches (%s) whose tensors differ in their first dimension: that of the first one, %d "
                "here, is taken for the number of samples, which weighs batches in the epoch's mean; others have %s. "
                "If that is not so, say it: %s.", hook, name, kind, known, ", ".join(map(str, others[:5])), remedy,
            )  # fmt: skip


def _checked(name: str, given: Any) -> int:
    """A weight as a number: what is negative or no number would make an epoch's mean wrong without a word."""
    weight = given
    with suppress(AttributeError, ValueError, RuntimeError):  # a tensor or an array, of one element
        weight = given.item()
    if isinstance(weight, (int, float)) and 0 <= weight < math.inf:
        return weight  # type: ignore[return-value]  # a fraction weighs as well
    shown = f"<{type(given).__name__} of shape {tuple(given.shape)}>" if hasattr(given, "shape") else repr(given)
    raise MetricError(
        f"self.log({name!r}, ..., batch_size={shown}): give the number of samples that the value is of, 0 or more."
    )
