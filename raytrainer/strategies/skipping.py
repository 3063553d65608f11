"""Skipping the rest of an epoch: all workers do, in the same batch, or are told of it."""

from __future__ import annotations

import time
from typing import Any

from raytrainer.errors import DisagreementError

__all__ = ["skip_together"]

#: Seconds to wait for the other workers, whose batches may come later; and between looks.
_PATIENCE, _LOOK_EVERY = 20.0, 0.002


def skip_together(store: Any, rank: int, size: int, chunk: int, batch: int) -> None:
    """This worker skips the rest of the epoch from a batch on: wait for all others to do so.

    One that does not waits for this one's gradients, for as long as a collective waits.

    Args:
        store: That all workers share.
        rank: This worker's.
        size: How many they are.
        chunk: Its number, which no other has had in this store.
        batch: Its index in the epoch.

    Raises:
        DisagreementError: Others do not skip.
    """
    key = f"raytrainer/skip/{chunk}/{batch}"
    store.set(f"{key}/{rank}", "")
    store.add(key, 1)
    until = time.monotonic() + _PATIENCE
    while store.add(key, 0) < size:
        if time.monotonic() > until:
            skipping = [other for other in range(size) if store.check([f"{key}/{other}"])]
            raise DisagreementError(
                f"on_train_batch_start returned -1 in batch {batch} on rank(s) {skipping}, and not on the others: all "
                f"workers must skip the rest of an epoch in the same batch. Decide by what is the same on all of them; "
                f"to skip one worker's batch, return None from training_step."
            )
        time.sleep(_LOOK_EVERY)
