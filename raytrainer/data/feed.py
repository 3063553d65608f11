"""`Feed`: a user's loader as a worker reads it: sharded, limited, and restartable at any batch of any epoch."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from raytrainer.data.loader_processes import garbage_left_alone
from raytrainer.data.sharding import IndexShard, SeededDataset, ShardedBatches, Share
from raytrainer.errors import DataError
from raytrainer.plan.seeds import derive_seed
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import Past, batches_before, resolve_limit
from raytrainer.private.torch_private import forget_iterator, take_iterator
from raytrainer.seeding import host_generators

__all__ = ["Feed", "as_list"]

log = logging.getLogger("raytrainer")


def as_list(loaders: Any) -> list[Any]:
    """One loader, a list of loaders, or a mapping of them, as a list."""
    if loaders is None:
        return []
    if isinstance(loaders, (list, tuple)) and all(_is_loader(item) for item in loaders):
        return list(loaders)
    if isinstance(loaders, dict) and all(_is_loader(item) for item in loaders.values()):
        return list(loaders.values())
    return [loaders]


def _is_loader(item: Any) -> bool:
    # a list of tensors is a loader with tensors for batches; a list of loaders is several loaders
    return isinstance(item, DataLoader) or (hasattr(item, "__iter__") and not isinstance(item, (torch.Tensor, dict)))


class Feed:
    """One loader on one worker.

    Args:
        loader: A DataLoader, or any iterable of batches (read as it is, whole, by every worker).
        stage: "train", "val", "test" or "predict". Training shards samples and pads; the others shard whole batches,
            each of which is then read by exactly one worker.
        share: This worker's part.
        seed: The run's seed.
        settings: For the limit, and whether samplers are replaced.

    Attributes:
        length: Batches to read of this worker's part, after the limit; None: until it ends.
        ends_unannounced: Whether the end is only known by reaching it.

    Raises:
        DataError: No iterable, or no batch for this worker in training.
    """

    def __init__(self, loader: Any, stage: str, share: Share, seed: int, settings: Settings) -> None:
        if not hasattr(loader, "__iter__"):
            raise DataError(
                f"the {stage} loader is {loader!r}: return a DataLoader, or an iterable of batches, from "
                f"{stage}_dataloader()."
            )
        self.stage, self.share, self.seed = stage, share, seed
        self.source = loader
        self.batches: ShardedBatches | None = None
        self.iterable_dataset = isinstance(getattr(loader, "dataset", None), IterableDataset)
        self.loader = self._sharded(loader, settings) if isinstance(loader, DataLoader) else loader
        own = _length(self.loader)
        # fractions are of the longest part, so that all workers agree on them
        longest = own if self.batches is None or own is None else -(-self.batches.total // self.batches.share.count)
        self._limit = limit = resolve_limit(f"limit_{stage}_batches", settings.limit(stage), longest)
        self.length = limit if own is None else own if limit is None else min(own, limit)
        self._replay = 0
        self._reading: Callable[[], Any] = lambda: None  # a weak reference to the loader's latest iterator
        self.ends_unannounced = own is None or self.iterable_dataset
        if own == 0 and settings.limit(stage) != 0:
            self._refuse_empty(settings)

    def _refuse_empty(self, settings: Settings) -> None:
        """No batch at all for this worker: an error, but for evaluation with fewer batches than workers."""
        if self.batches is not None and not self.batches.pad and self.batches.total > 0:
            return
        size = _length(getattr(self.source, "dataset", None))
        batch_size = getattr(self.source, "batch_size", None)
        drop_last = getattr(self.source, "drop_last", False)
        raise DataError(
            f"the {self.stage} loader has no batch for rank {self.share.index} of {self.share.count}: its dataset has "
            f"{'an unknown number of' if size is None else size} sample(s), batch_size={batch_size}, "
            f"drop_last={drop_last}. Give it more data, a smaller batch_size, drop_last=False or fewer workers, or "
            f"switch the stage off with limit_{self.stage}_batches=0."
        )

    def refuse_nothing(self, epoch: int) -> None:
        """The loader ended before its first batch of a training epoch, which would otherwise train for ever."""
        raise DataError(
            f"the {self.stage} loader gave no batch to rank {self.share.index} of {self.share.count} in epoch {epoch}. "
            f"If it reads an IterableDataset, make sure that each worker yields something; if it is an iterator, which "
            f"can be read once only, return a DataLoader or an object whose __iter__ starts anew."
        )

    # ---------------------------------------------------------------- sharding

    def _sharded(self, loader: DataLoader[Any], settings: Settings) -> DataLoader[Any]:
        """A copy of the loader with samplers of ours."""
        # a copy: the user's loader stays as it is. __dict__, since DataLoader refuses to set samplers
        copied = copy.copy(loader)
        forget_iterator(copied)
        if settings.on_gpu and loader.num_workers > 0:
            # done by a thread of the loader's, it costs the training loop nothing
            copied.__dict__["pin_memory"] = True
        if self.iterable_dataset:
            if self.share.count > 1 and not settings.fast_dev_run:
                log.info(
                    "The %s loader reads an IterableDataset: each worker reads what it yields there; shard it by "
                    "self.trainer.global_rank (by node_rank for ddp2).", self.stage,
                )  # fmt: skip
            return copied
        batched = loader.batch_sampler is not None
        outer: Any = loader.batch_sampler if batched else loader.sampler
        inner: Any = getattr(outer, "sampler", loader.sampler) if batched else loader.sampler
        own_sharding = isinstance(inner, DistributedSampler) or isinstance(loader.sampler, DistributedSampler)
        train = self.stage == "train"
        if train and settings.overfit:
            inner = torch.utils.data.SequentialSampler(loader.dataset)  # type: ignore[arg-type]
        share, redraw = Share(0, 1), False
        seeded = batched and loader.num_workers > 0
        if settings.use_distributed_sampler and not own_sharding:
            share = self.share
            if (not batched or type(outer) is BatchSampler) and _length(inner) is not None:
                # training shards samples; evaluation whole batches, so that each is what one process would see
                shard = IndexShard(inner, share if train else Share(0, 1), self.seed)
                outer = BatchSampler(shard, outer.batch_size, outer.drop_last) if batched else shard
                share = Share(0, 1) if train else share
            else:
                redraw = _length(outer) is not None
        self.batches = ShardedBatches(outer, share, self.seed, pad=train, seeded=seeded, redraw=redraw)
        self.batches.rank = self.share.index
        if _length(outer) is None and share.count > 1:
            raise DataError(
                f"the {self.stage} loader's batch sampler {type(outer).__name__} has no length, so it cannot be "
                f"sharded over {share.count} workers; give it __len__, or use_distributed_sampler=False."
            )
        copied.__dict__["batch_sampler" if batched else "sampler"] = self.batches
        if seeded:
            copied.__dict__["dataset"] = SeededDataset(loader.dataset)
        return copied

    # ---------------------------------------------------------------- reading

    def rebase(self, before: Past) -> None:
        """Leave out the epoch's first batches, which groups of other sizes have done."""
        offset, count = batches_before(before), self.share.count
        if self.batches is None:
            self._replay = offset // count
        elif isinstance(shard := getattr(self.batches.source, "sampler", self.batches.source), IndexShard):
            shard.begin = offset * (getattr(self.source, "batch_size", None) or 1)
        else:
            # batches of an own DistributedSampler are this worker's alone
            self.batches.begin = offset if self.batches.share.count > 1 else offset // count
        if offset or self.length is not None:
            own = _length(self.loader)
            left = None if self._limit is None else max(0, -(-(self._limit * count - offset) // count))
            self.length = left if own is None else own if left is None else min(own, left)

    def start(self, epoch: int, skip: int = 0, agree: Callable[[bool], bool] | None = None) -> Iterator[Any]:
        """Batches of `epoch` from batch `skip` on.

        `agree` makes parts of unknown length end together: see `LookAhead`.
        """
        if self.batches is not None:
            self.batches.set_epoch(epoch, skip)
            skip = 0
        else:
            skip += self._replay
            dataset = getattr(self.loader, "dataset", None)
            for owner in (dataset, getattr(self.loader, "sampler", None)):
                set_epoch = getattr(owner, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epoch)
        if isinstance(self.loader, DataLoader):
            # seeds the loader's processes; the global generators are left to the training
            seed = derive_seed(self.seed, "processes", self.stage, self.share.index, epoch)
            self.loader.generator = torch.Generator().manual_seed(seed)
        iterator = self._read_alike(epoch) if self.share.readers > 1 else self._iterate()
        for _ in range(skip):  # a loader that cannot skip is replayed
            if next(iterator, _END) is _END:
                break
        return LookAhead(iterator, agree) if self.ends_unannounced else iterator

    def _iterate(self) -> Iterator[Any]:
        with garbage_left_alone():
            iterator = iter(self.loader)
        with contextlib.suppress(TypeError):
            self._reading = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        """End the loader's processes. Left to garbage collection, each may take 5 s, at any time."""
        kept = take_iterator(self.loader) if isinstance(self.loader, DataLoader) else None
        for iterator in (self._reading(), kept):
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
        if isinstance(self.loader, DataLoader):
            forget_iterator(self.loader)

    def _read_alike(self, epoch: int) -> Iterator[Any]:
        """Batches that are random in the same way on all readers of the share.

        What is drawn in this process (by samplers, and by datasets without loader processes) depends on (seed, share,
        epoch, batch) alone, and leaves the generators of the training (dropout) as they are.
        """
        iterator: Iterator[Any] | None = None
        begin = 0 if self.batches is None else self.batches.skip
        for position in itertools.count(begin):
            with host_generators(derive_seed(self.seed, "reader", self.stage, self.share.index, epoch, position)):
                if iterator is None:
                    iterator = self._iterate()
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch


_END = object()


class LookAhead(Iterator[Any]):
    """Reads one batch ahead, so that the last one is known when it is handed out.

    With `agree`, the end comes for all workers as soon as it comes for one.
    """

    def __init__(self, iterator: Iterator[Any], agree: Callable[[bool], bool] | None) -> None:
        self.iterator = iterator
        self.agree = agree
        self.ended = False  # here, rather than for another worker
        self.ahead = self._read()

    def _read(self) -> Any:
        item = next(self.iterator, _END)
        self.ended = item is _END
        if self.agree is not None and not self.agree(item is not _END):
            return _END
        return item

    @property
    def is_last(self) -> bool:
        """Whether the batch handed out latest was the last."""
        return self.ahead is _END

    def __next__(self) -> Any:
        if self.ahead is _END:
            raise StopIteration
        item, self.ahead = self.ahead, self._read()
        return item


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None
