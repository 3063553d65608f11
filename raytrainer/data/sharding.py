"""Which samples a worker gets, in which order, from which batch on: samplers that know (seed, epoch, cursor)."""

from __future__ import annotations

import itertools
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler

from raytrainer.data.known_samplers import is_plain_batching, is_plain_shuffle, is_torchs
from raytrainer.data.memories import seed_own_generators, tell_epoch
from raytrainer.data.seeded_indices import with_seed
from raytrainer.plan.seeds import derive_seed
from raytrainer.seeding import capture_rng, restore_rng, rng_untouched, seed_generators, seed_host

__all__ = ["IndexShard", "ShardedBatches", "Share"]


COMPARED = 256  #: Indices, or batches, at the beginning of an epoch that tell one order from another.


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts, read alike by so many workers (`readers`)."""

    index: int
    count: int
    readers: int = 1


def drawn(source: Any, seed: int, global_seed: int) -> list[Any]:
    """All that a sampler gives in one epoch, with its own generators and the global ones seeded anew.

    As much as its length says, where there is no end to it.
    """
    with rng_untouched():
        seed_own_generators(source, seed)
        seed_generators(global_seed)
        length = len(source)  # which is of the next epoch, maybe, once a sampler has begun this one
        iterator = iter(source)
        found = list(itertools.islice(iterator, length))
        # it may be known better now that batches have been made; and one more lets a sampler come to its end
        found += itertools.islice(iterator, max(0, len(source) - len(found)))
        next(iterator, None)
        return found


def drawn_lazily(source: Any, seed: int, global_seed: int) -> Iterator[Any]:
    """The same of a sampler without a length, one by one, leaving the generators of the training alone."""
    seed_own_generators(source, seed)
    state: Any = None
    iterator: Any = None
    while True:
        with rng_untouched():
            if iterator is None:
                seed_generators(global_seed)
                iterator = iter(source)
            else:
                restore_rng(state)
            try:
                item = next(iterator)
            except StopIteration:
                return
            state = capture_rng()
        yield item


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
        self.source, self.share, self.seed, self.epoch = source, share, seed, 0
        self.begin = 0  # samples at the front that are done already, by a group of another size
        self.drawn: list[Any] | None = None  # a user's sampler's indices of this epoch

    def begin_epoch(self, epoch: int) -> None:
        """Forget what was drawn for another one."""
        self.epoch, self.drawn = epoch, None
        if not is_torchs(self.source):
            tell_epoch(self.source, epoch)

    def draw(self) -> None:
        """Have a user's sampler draw this epoch's indices; then their number is known too."""
        if self.drawn is None and not is_torchs(self.source):
            seed = derive_seed(self.seed, "sampler", self.epoch)
            self.drawn = drawn(self.source, seed, seed)

    def __len__(self) -> int:
        total = len(self.source if self.drawn is None else self.drawn)
        return -(-max(0, total - self.begin) // self.share.count)

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
        if is_plain_shuffle(source):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "shuffle", self.epoch))
            order: list[Any] = torch.randperm(len(source), generator=generator).tolist()
            return order
        self.draw()
        assert self.drawn is not None
        return self.drawn


class ShardedBatches(Sampler[list[Any]]):
    """One worker's batches of a batch sampler: every `count`-th batch, from batch `skip` on.

    Args:
        source: A batch sampler, or any sampler of indices where the loader does not batch; over an `IndexShard` where
            this package orders and shards the indices.
        share: This worker's part of the *batches*. `Share(0, 1)` where the indices are sharded already.
        seed: The run's seed.
        pad: Repeat batches so that every worker has equally many; for training.
        seeded: Hand out indices with a seed each, for a loader with processes.
        rank: Whose augmentation in those processes this is; also of the order where `alone`.
        alone: `source` is for this worker alone, so that global generators need not be alike on all workers.

    Attributes:
        sealed: See `with_seed`: nobody looks at indices on their way.
        seeding: The thread in which indices are asked for while generators may be seeded for what is read by them;
            whoever sets it puts them back. None: they are left alone.
        asked_in: In which thread batches were asked for, where they are seeded.
    """

    def __init__(
        self,
        source: Any,
        share: Share,
        seed: int,
        *,
        pad: bool,
        seeded: bool = False,
        rank: int = 0,
        alone: bool = False,
    ) -> None:
        self.source, self.share, self.seed, self.pad, self.seeded = source, share, seed, pad, seeded
        self.sealed, self.asked_in = True, 0
        self.seeding: int | None = None
        self.rank, self.alone = rank, alone
        inner = getattr(source, "sampler", source) if is_plain_batching(source) else source
        self.shard: IndexShard | None = inner if isinstance(inner, IndexShard) else None
        self.epoch = 0
        self.skip = 0
        self.begin = 0  # batches at the front that are done already, by a group of another size
        self.drawn: list[Any] | None = None  # a user's batch sampler's batches of this epoch
        self.noted: deque[list[Any]] | None = None  # batches asked for and not delivered yet, where that is of interest

    @property
    def users(self) -> Any:
        """The sampler that the user gave."""
        return self.source if self.shard is None else self.shard.source

    def begin_epoch(self, epoch: int) -> None:
        """Tell the samplers, whose length and order may change."""
        self.epoch, self.skip, self.drawn = epoch, 0, None
        if self.shard is None:
            tell_epoch(self.source, epoch)
        else:
            self.shard.begin_epoch(epoch)

    def draw(self) -> None:
        """Have a user's sampler draw the epoch, if it has an end."""
        if self.shard is not None:
            self.shard.draw()
        elif self.drawn is None and _has_length(self.source):
            self.drawn = drawn(self.source, *self._seeds())

    def order_sum(self) -> int | None:
        """A checksum of the order that a user's sampler has drawn for this epoch; None: of what is drawn here."""
        found = self.drawn if self.shard is None else self.shard.drawn
        return None if found is None else zlib.crc32(repr((len(found), found[:COMPARED])).encode())

    def _seeds(self) -> tuple[int, int]:
        seed = derive_seed(self.seed, "batches", self.epoch)
        return seed, derive_seed(self.seed, "batches", self.rank, self.epoch) if self.alone else seed

    @property
    def total(self) -> int:
        """Batches of all workers together."""
        return max(0, len(self.source if self.drawn is None else self.drawn) - self.begin)

    def sizes(self) -> tuple[Any, ...]:
        """What the number of batches depends on, where the samplers are torch's own."""
        try:
            samples = len(self.users)
        except (TypeError, NotImplementedError):
            samples = None
        return samples, getattr(self.source, "batch_size", None), getattr(self.source, "drop_last", None)

    def longest_part(self) -> int:
        """Batches of the worker with most, had nobody begun the epoch."""
        begun = self.begin, 0 if self.shard is None else self.shard.begin
        self._begin_at(0, 0)
        longest = -(-self.total // self.share.count)
        self._begin_at(*begun)
        return longest

    def length_in(self, epoch: int) -> int:
        """`len` of another epoch, as far as it can be told without drawing it."""
        parts = [self] if self.shard is None else [self, self.shard]
        kept = [dict(vars(part)) for part in parts]
        try:
            self.begin_epoch(epoch)
            self._begin_at(0, 0)
            return len(self)
        finally:
            for part, attributes in zip(parts, kept, strict=True):
                vars(part).update(attributes)
            tell_epoch(self.users, self.epoch)

    def _begin_at(self, batch: int, sample: int) -> None:
        self.begin = batch
        if self.shard is not None:
            self.shard.begin = sample

    def skip_to(self, batch: int) -> None:
        """Begin there when next iterated; from then on, this epoch's length is what is left of it.

        For loaders of the users', which may ask for as many batches as `len` says.
        """
        self.skip = batch

    def __len__(self) -> int:
        index, count = self.share.index, self.share.count
        whole = -(-self.total // count) if self.pad else -(-(self.total - index) // count)
        return max(0, whole - self.skip)

    def __iter__(self) -> Iterator[list[Any]]:
        batches: Iterator[Any] = itertools.islice(self._shard(), self.skip, None)
        if self.noted is not None:
            batches = self._noting(batches, self.noted)
        return self._with_seeds(batches) if self.seeded or self.seeding is not None else batches

    def _noting(self, batches: Iterator[Any], noted: deque[list[Any]]) -> Iterator[Any]:
        noted.clear()
        for batch in batches:
            indices: Any = batch.tolist() if hasattr(batch, "tolist") else batch
            noted.append(list(indices) if isinstance(indices, (list, tuple)) else [indices])
            yield batch

    def _with_seeds(self, batches: Iterator[list[Any]]) -> Iterator[Any]:
        for position, batch in enumerate(batches, self.skip):
            seed = derive_seed(self.seed, "loader", self.rank, self.epoch, position)
            self.asked_in = threading.get_ident()
            if self.seeding == self.asked_in:
                seed_host(seed)
            yield with_seed(batch, seed, self.sealed) if self.seeded else batch

    def _shard(self) -> Iterator[list[Any]]:
        index, count = self.share.index, self.share.count
        self.draw()
        if self.shard is not None:
            return itertools.islice(self.source, self.begin + index, None, count)
        if self.drawn is None:
            return itertools.islice(drawn_lazily(self.source, *self._seeds()), self.begin, None)
        batches = self.drawn[self.begin :]
        missing = -len(batches) % count if self.pad else 0
        if missing and batches:
            batches += (batches * -(-missing // len(batches)))[:missing]
        return iter(batches[index::count])


def _has_length(sampler: Any) -> bool:
    try:
        len(sampler)
    except (TypeError, NotImplementedError):
        return False
    return True
