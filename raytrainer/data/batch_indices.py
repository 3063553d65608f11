"""Which samples batches are made of, for those who write down what became of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from raytrainer.data.sharding import ShardedBatches

__all__ = ["note_indices"]


def note_indices(feed: Any) -> Callable[[], list[Any] | None]:
    """From now on: what tells the indices of the batch that a feed has delivered, to be asked once for each.

    It says None where no sampler chooses the samples, or where batches may come in another order.
    """
    batches = getattr(feed, "batches", None)
    if not isinstance(batches, ShardedBatches) or not getattr(feed.reader, "in_order", True):
        return lambda: None
    noted = batches.noted = deque[list[Any]]()
    return lambda: noted.popleft() if noted else None
