"""Skipping the rest of an epoch: all workers do, in the same batch, or are told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from raytrainer.errors import DisagreementError

__all__ = ["skip_together"]

#: Seconds to wait for the other workers, whose batches may come later: as long as a collective; and where a worker that
#: goes on cannot be told from one whose batch has not come.
_PATIENCE, _PATIENCE_UNSEEN = 1800.0, 300.0

#: Seconds between two looks, which get longer: a thousand workers may ask the same store.
_LOOK_FIRST, _LOOK_LAST = 0.001, 0.05


def skip_together(
    store: Any, rank: int, size: int, chunk: int, batch: int, in_step: Callable[[], Sequence[int]] | None
) -> None:
    """This worker skips the rest of the epoch from a batch on: wait for all others to do so.

    One that does not waits for this one's gradients, for as long as a collective waits.

    Args:
        store: That all workers share.
        rank: This worker's.
        size: How many they are.
        chunk: Its number, which no other has had in this store.
        batch: Its index in the epoch.
        in_step: Gives the ranks that have gone on to this batch's step; None: that is not known.

    Raises:
        DisagreementError: Others do not skip.
    """
    key = f"raytrainer/skip/{chunk}/{batch}"
    store.set(f"{key}/{rank}", "")
    store.add(key, 1)
    patience = _PATIENCE_UNSEEN if in_step is None else _PATIENCE
    until, pause = time.monotonic() + patience, _LOOK_FIRST
    while store.add(key, 0) < size:
        going_on = [] if in_step is None else in_step()
        if going_on or time.monotonic() > until:
            skipping = [other for other in range(size) if store.check([f"{key}/{other}"])]
            others = f"on rank(s) {list(going_on)}" if going_on else f"on the others within {patience:g} s"
            raise DisagreementError(
                f"on_train_batch_start returned -1 in batch {batch} on rank(s) {skipping}, and not {others}: all "
                f"workers must skip the rest of an epoch in the same batch. Decide by what is the same on all of them; "
                f"to skip one worker's batch, return None from training_step."
            )
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_LAST)
