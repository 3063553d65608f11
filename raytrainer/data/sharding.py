"""Which samples a worker gets, in which order, from which batch on: samplers that know (seed, epoch, cursor)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, RandomSampler, Sampler, SequentialSampler

from raytrainer.plan.seeds import derive_seed
from raytrainer.seeding import rng_untouched, seed_generators

__all__ = ["IndexShard", "SeededDataset", "SeededIndices", "ShardedBatches", "Share"]


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts, read alike by so many workers (`readers`)."""

    index: int
    count: int
    readers: int = 1


class IndexShard(Sampler[Any]):
    """One worker's part of a sampler's indices: every `count`-th, in an order drawn from (seed, epoch).

    Parts are made equal by taking some samples twice, so that all workers have the same number of batches
    (as torch's DistributedSampler does).

    Args:
        source: The loader's own sampler. Sequential and shuffling ones are redone here; any other is run with all
            generators seeded by (seed, epoch), so that workers agree on its order.
        share: This worker's part.
        seed: The run's seed.
    """

    def __init__(self, source: Any, share: Share, seed: int) -> None:
        self.source, self.share, self.seed = source, share, seed
        self.epoch = 0
        self.begin = 0  # samples at the front that are done already, by a group of another size

    def __len__(self) -> int:
        return -(-max(0, len(self.source) - self.begin) // self.share.count)

    def __iter__(self) -> Iterator[Any]:
        indices: Any = self._all()[self.begin :]
        if not indices:
            return iter(())
        count = self.share.count
        missing = -len(indices) % count
        if missing:
            indices = [*indices, *(list(indices) * -(-missing // len(indices)))[:missing]]
        return iter(indices[self.share.index :: count])

    def _all(self) -> Sequence[Any]:
        source = self.source
        if type(source) is SequentialSampler:
            return range(len(source))
        plain_shuffle = type(source) is RandomSampler and not source.replacement
        if plain_shuffle and source.num_samples == len(source.data_source):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", self.epoch))
            order: list[Any] = torch.randperm(len(source), generator=generator).tolist()
            return order
        with rng_untouched():
            seed_generators(derive_seed(self.seed, "sampler", self.epoch))
            _set_epoch(source, self.epoch)
            return list(source)


class ShardedBatches(Sampler[list[Any]]):
    """One worker's batches of a batch sampler: every `count`-th batch, from batch `skip` on.

    Args:
        source: A batch sampler, or any sampler of indices where the loader does not batch.
        share: This worker's part of the *batches*. `Share(0, 1)` where the indices are sharded already.
        seed: The run's seed.
        pad: Repeat batches so that every worker has equally many; for training.
        seeded: Hand out batches as `SeededIndices`, for a loader with processes over a `SeededDataset`.
        redraw: Draw `source`'s order from (seed, epoch) rather than from wherever the generators are.
    """

    def __init__(
        self, source: Any, share: Share, seed: int, *, pad: bool, seeded: bool = False, redraw: bool = False
    ) -> None:
        self.source, self.share, self.seed, self.pad, self.seeded = source, share, seed, pad, seeded
        self.redraw = redraw or share.count > 1
        self.epoch = 0
        self.skip = 0
        self.begin = 0  # batches at the front that are done already, by a group of another size
        self.rank = share.index

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Begin at batch `skip` of `epoch` when next iterated."""
        self.epoch, self.skip = epoch, skip
        _set_epoch(self.source, epoch)

    @property
    def total(self) -> int:
        """Batches of all workers together."""
        return max(0, len(self.source) - self.begin)

    def __len__(self) -> int:
        index, count = self.share.index, self.share.count
        if self.pad:
            return -(-self.total // count)
        return max(0, -(-(self.total - index) // count))

    def __iter__(self) -> Iterator[list[Any]]:
        for position, batch in enumerate(self._shard()):
            if position < self.skip:
                continue
            if self.seeded:
                seed = derive_seed(self.seed, "loader", self.rank, self.epoch, position)
                yield SeededIndices(batch, seed)
            else:
                yield batch

    def _shard(self) -> Iterator[list[Any]]:
        index, count = self.share.index, self.share.count
        if not self.redraw:
            yield from itertools.islice(self.source, self.begin, None)
            return
        with rng_untouched():  # a custom batch sampler draws its order here, alike on all workers
            seed_generators(derive_seed(self.seed, "batches", self.epoch))
            batches = list(self.source)[self.begin :]
        missing = -len(batches) % count if self.pad else 0
        if missing and batches:
            batches += (batches * -(-missing // len(batches)))[:missing]
        yield from batches[index::count]


class SeededIndices(list[Any]):
    """Indices of a batch, with the seed for the randomness of its samples."""

    def __init__(self, indices: Any, seed: int) -> None:
        super().__init__(indices)
        self.seed = seed

    def __reduce__(self) -> Any:
        return SeededIndices, (list(self), self.seed)


class SeededDataset(Dataset[Any]):
    """A dataset whose random augmentation in loader processes depends on (seed, rank, epoch, batch) alone.

    So it does not matter how many loader processes there are, or where a run was resumed.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        if isinstance(indices, SeededIndices):
            seed_generators(indices.seed)
        fetch_all = getattr(self.dataset, "__getitems__", None)
        if callable(fetch_all):
            fetched: list[Any] = fetch_all(indices)
            return fetched
        return [self.dataset[index] for index in indices]


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Tell a sampler, and the sampler inside it, which epoch it is, in whichever way it takes that."""
    seen = 0
    while sampler is not None and seen < 8:
        if isinstance(sampler, (IndexShard, ShardedBatches)):
            sampler.epoch = epoch
        elif callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "source", None) or getattr(sampler, "sampler", None)
        seen += 1
