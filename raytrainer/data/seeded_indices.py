"""Indices on their way to a loader's process, which bring the seed of what is drawn for them there.

So augmentation there depends on (seed, rank, epoch, batch) alone, however many processes there are and wherever a run
was resumed; and dataset, `worker_init_fn` and `collate_fn` are the user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from raytrainer.data.own_generators import seed_those_of
from raytrainer.plan.seeds import derive_seed
from raytrainer.seeding import seed_generators

__all__ = ["SeededCollate", "with_seed"]


def with_seed(indices: Any, seed: int, sealed: bool) -> Any:
    """What a process gets as `indices` (a batch's list, tuple, array or tensor; or one index), seeded on arrival.

    Lists, tuples and integers stay what they are, since a loader of the user's may look into them on the way. Anything
    else is `sealed`, or else goes without a seed.
    """
    found: Any
    if isinstance(indices, list):
        found = _List(indices)
    elif type(indices) is tuple:
        found = _Tuple(indices)
    elif type(indices) is int:
        found = _Index(indices)
    elif sealed:
        found = _Sealed()
        found.indices = indices
    else:
        return indices
    found.seed = seed
    return found


class _List(list[Any]):
    seed: int

    def __reduce__(self) -> Any:
        return _arrive, (list(self), self.seed)


class _Tuple(tuple[Any, ...]):
    seed: int

    def __reduce__(self) -> Any:
        return _arrive, (tuple(self), self.seed)


class _Index(int):
    seed: int

    def __reduce__(self) -> Any:
        return _arrive, (int(self), self.seed)


class _Sealed:
    indices: Any
    seed: int

    def __reduce__(self) -> Any:
        return _arrive, (self.indices, self.seed)


class SeededCollate:
    """A user's `collate_fn`, in a loader's process: generators that it has are seeded with each batch.

    Attributes:
        seed: Of the batch that is made, as its indices brought it; None: they brought none.
    """

    seed: int | None = None

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        if SeededCollate.seed is not None:
            seed_those_of(self.collate, derive_seed(SeededCollate.seed, "collate"))
        return self.collate(samples)


def _arrive(indices: Any, seed: int) -> Any:
    info = get_worker_info()
    if info is not None:
        seed_generators(seed)
        seed_those_of(info.dataset, seed)
        SeededCollate.seed = seed
    return indices
