"""Indices on their way to a loader's process, which bring the seed of what is drawn for them there.

So augmentation there depends on (seed, rank, epoch, batch) alone, however many processes there are and wherever a run
was resumed; and dataset, `worker_init_fn` and `collate_fn` are the user's own.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import get_worker_info

from raytrainer.seeding import seed_generators

__all__ = ["with_seed"]


def with_seed(indices: Any, seed: int) -> Any:
    """What a process gets as `indices` (a batch's list, tuple, array or tensor; or one index), seeded on arrival.

    Lists stay lists, which loaders of the user's may look into.
    """
    return _Indices(indices, seed) if isinstance(indices, list) else _Sealed(indices, seed)


class _Indices(list[Any]):
    def __init__(self, indices: list[Any], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed

    def __reduce__(self) -> Any:
        return _arrive, (list(self), self.seed)


class _Sealed:
    """For one process after another only: unpickled, it is what it holds."""

    def __init__(self, indices: Any, seed: int) -> None:
        self.content = indices, seed

    def __reduce__(self) -> Any:
        return _arrive, self.content


def _arrive(indices: Any, seed: int) -> Any:
    if get_worker_info() is not None:
        seed_generators(seed)
    return indices
