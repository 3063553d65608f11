"""Searching for a learning rate and a batch size: the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raytrainer.errors import ConfigurationError

__all__ = ["SizeSearch", "diverged_at", "rates", "smoothed", "steepest"]


def rates(lowest: float, highest: float, count: int, mode: str) -> list[float]:
    """`count` learning rates from `lowest` to `highest`, spaced evenly ("linear") or by a factor ("exponential").

    Raises:
        ConfigurationError: An argument cannot work.
    """
    if not 0 < lowest < highest < math.inf:
        raise ConfigurationError(f"lr_find(min_lr={lowest}, max_lr={highest}): give 0 < min_lr < max_lr.")
    if count < 3:
        raise ConfigurationError(f"lr_find(num_training={count}): give 3 steps or more; 100 is usual.")
    if mode not in ("exponential", "linear"):
        raise ConfigurationError(f'lr_find(mode={mode!r}): give "exponential" or "linear".')
    parts = [index / (count - 1) for index in range(count)]
    if mode == "linear":
        return [lowest + (highest - lowest) * part for part in parts]
    return [lowest * (highest / lowest) ** part for part in parts]


def smoothed(losses: Sequence[float], beta: float = 0.98) -> list[float]:
    """The exponential moving average, divided by the sum of its weights so that it does not begin at 0.

    The same correction as Adam's (Kingma and Ba, "Adam", 2015, section 3).
    """
    average, found = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        found.append(average / (1 - beta**count))
    return found


def diverged_at(losses: Sequence[float], threshold: float | None, first: int = 0) -> int | None:
    """Index of the first loss that is not finite, or worse than `threshold` times the best before it.

    Of those before index `first`, which are averages of few, only whether they are finite counts.
    """
    best = math.inf
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            return index
        if index >= first:
            if threshold is not None and loss > best + (threshold - 1) * abs(best):
                return index
            best = min(best, loss)
    return None


def steepest(losses: Sequence[float], skip_begin: int, skip_end: int) -> int | None:
    """Index at which the losses fall fastest, before their running mean is least; None where they do not fall.

    So is a learning rate chosen by Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3:
    where the loss falls, rather than where it is least. The slope at each index is that of the least-squares line
    through a tenth of the losses on either side, which noise of single batches moves less than differences would.

    Args:
        losses: As they were, unsmoothed.
        skip_begin: Leave out so many of the first indices.
        skip_end: And so many of the last.
    """
    half = max(2, len(losses) // 10)
    means = [sum(part) / len(part) for part in (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))]
    end = min(len(losses) - skip_end, means.index(min(means)) + 1) if means else 0
    slopes = {
        index: _slope(losses[max(0, index - half) : min(end, index + half + 1)]) for index in range(skip_begin, end)
    }
    if not slopes:
        return None
    index = min(slopes, key=lambda key: slopes[key])
    return index if slopes[index] < 0 else None


def _slope(values: Sequence[float]) -> float:
    """Of the least-squares line through equally spaced values."""
    middle = (len(values) - 1) / 2
    square = sum((index - middle) ** 2 for index in range(len(values)))
    return sum((index - middle) * value for index, value in enumerate(values)) / square if square else 0.0


class SizeSearch:
    """Finds the largest size that works, by doubling ("power"), then in "binsearch" by halving the gap.

    Args:
        mode: "power" or "binsearch".
        first: The size to begin with.
        max_trials: Sizes to try at most.
        largest: No size above this one is tried; None: any.

    Attributes:
        size: The next size to try; None when the search is over.
        best: The largest that has worked; None before any.

    Raises:
        ConfigurationError: An argument cannot work.
    """

    def __init__(self, mode: str, first: int, max_trials: int, largest: int | None = None) -> None:
        if mode not in ("power", "binsearch"):
            raise ConfigurationError(f'scale_batch_size(mode={mode!r}): give "power" or "binsearch".')
        if first < 1 or max_trials < 1:
            raise ConfigurationError(f"scale_batch_size(init_val={first}, max_trials={max_trials}): give 1 or more.")
        if largest is not None and largest < 1:
            raise ConfigurationError(f"scale_batch_size(max_val={largest}): give 1 or more, or None.")
        self.mode, self._left, self._largest = mode, max_trials, largest
        self.size: int | None = first if largest is None else min(first, largest)
        self.best: int | None = None
        self._failed: int | None = None

    def tell(self, worked: bool, enough: bool = False) -> None:
        """The size has worked or not; `enough`: larger ones would change nothing."""
        size = self.size
        assert size is not None
        self._left -= 1
        if worked:
            self.best = size
        else:
            self._failed = size
        self.size = None if self._left == 0 or (worked and enough) else self._next(size)

    def _next(self, size: int) -> int | None:
        if self._failed is None:
            larger = size * 2 if self._largest is None else min(size * 2, self._largest)
            return larger if larger > size else None
        if self.best is None:  # the first was too large
            return size // 2 or None
        if self.mode == "power" or self._failed - self.best <= 1:
            return None
        return (self._failed + self.best) // 2
