"""`Feed`: a user's loader as a worker reads it: sharded, limited, and restartable at any batch of any epoch."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from raytrainer.data.epoch_state import EpochState
from raytrainer.data.first_batches import watch
from raytrainer.data.held_objects import STREAMS, library_of
from raytrainer.data.loader_processes import control_c_left_alone, garbage_left_alone
from raytrainer.data.look_ahead import END, LookAhead
from raytrainer.data.memories import begins_otherwise, depends_on_epoch, tell_all
from raytrainer.data.own_readers import kept_readers, reads_plainly
from raytrainer.data.own_sharding import remedy
from raytrainer.data.reading_alike import Order, begun_alike, read_again, read_alike
from raytrainer.data.refused_loaders import ended_at_once, require_loader, without_batches
from raytrainer.data.sharded_loader import length_of, shard_loader
from raytrainer.data.sharding import Share
from raytrainer.data.streams import BegunAlike, Requests
from raytrainer.data.web_pipelines import shuffling_steps
from raytrainer.errors import DataError
from raytrainer.plan.seeds import derive_seed
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import Past, batches_before, resolve_limit, samples_before
from raytrainer.private.torch_private import forget_iterator, take_iterator

__all__ = ["Feed"]

log = logging.getLogger("raytrainer")


class Feed:
    """One loader on one worker.

    Args:
        loader: A DataLoader, or any iterable of batches (read as it is, whole, by every worker).
        stage: "train", "val", "test" or "predict". Training shards samples and pads; the others shard whole batches,
            each of which is then read by exactly one worker.
        share: This worker's part.
        seed: The run's seed.
        settings: For the limit, and whether samplers are replaced.
        epoch: The first to be read, on which a sampler's length may depend.

    Attributes:
        length: Batches to read of this worker's part in this epoch, after the limit; None: until it ends.
        ends_unannounced: Whether the end is only known by reaching it.
        nothing: No worker has any batch.
        watched: Takes the first batches, where it is not known that workers read different ones, or says of what.
        may_miss: Whether batches may be None: not with torch's own way of collating.
        batch_size: Samples in a batch, where that is known.
        steady: See `ShardedLoader`.

    Raises:
        DataError: No iterable, or in training samples, but no batch of them for this worker.
    """

    def __init__(self, loader: Any, stage: str, share: Share, seed: int, settings: Settings, epoch: int = 0) -> None:
        require_loader(loader, stage)
        self.source, self.stage, self.share, self.seed, self.settings = loader, stage, share, seed, settings
        sharded = shard_loader(loader, stage, share, seed, settings, epoch)
        self.loader, self.reader, self._stand_in = sharded.loader, sharded.reader, sharded.stand_in
        self._drawing, self.batch_size = sharded.batches, sharded.batch_size(loader)
        self.batches, self.steady = (sharded.batches if sharded.in_step else None), sharded.steady
        reading = loader if self.reader is None else self.reader
        self.iterable_dataset = isinstance(getattr(reading, "dataset", None), IterableDataset)
        self._state = EpochState(self.loader, self._drawing, seed)
        self.watched = watch(stage, share, sharded.splits, getattr(reading, "dataset", None), remedy(loader))
        collate = getattr(self.reader, "collate_fn", None)
        self.may_miss = collate is not default_collate or self.loader is not self.reader
        self._requests: Requests | None = None
        self._reading: Callable[[], Any] = lambda: None  # a weak reference to the loader's latest iterator
        self._epoch: int | None = None
        self._before: Past = ()
        self.length: int | None = None
        self._measured: Any = None  # by what `length` was found, where all that it depends on is known
        self.begin(epoch)
        self.ends_unannounced = self._own is None or self.iterable_dataset
        self.nothing = self._own == 0 and (self.batches is None or self.batches.total == 0)
        if self._own == 0 and settings.limit(stage) != 0:
            self._say_empty()

    def _say_empty(self) -> None:
        """No batch at all for this worker: an error where training has samples, but too few to make batches of."""
        if self.batches is not None and not self.batches.pad and self.batches.total > 0:
            return
        size = length_of(getattr(self.source, "dataset", None))
        message = without_batches(self.source, size, self.stage, self.share.index, self.share.count)
        if self.stage == "train" and size:
            raise DataError(message)
        if self.share.index == 0:
            log.warning("%s%s Without any, this stage does nothing.", message[0].upper(), message[1:])

    @property
    def divisible(self) -> bool:
        """Whether the rest of an epoch can be dealt out to another number of workers: not where it is read as it is."""
        return self.batches is not None

    def refuse_nothing(self, epoch: int) -> None:
        """The loader ended before its first batch of a training epoch, which would otherwise train for ever."""
        raise DataError(ended_at_once(self.stage, self.share.index, self.share.count, epoch))

    # ---------------------------------------------------------------- an epoch's batches

    def begin(self, epoch: int, before: Past = ()) -> None:
        """Take up an epoch: tell it to whatever takes that, and what groups of other sizes have done of it.

        Nothing is drawn yet, so that hooks may still change a sampler.
        """
        self._epoch, self._before = epoch, before
        self._state.begin(epoch)
        if self._drawing is not None:
            self._drawing.begin_epoch(epoch)
        if not self.steady:
            reading = self.reader if self.reader is not None else self.loader
            owners = getattr(reading, "dataset", None), getattr(reading, "sampler", None), reading, self.loader
            tell_all([owner for owner in owners if owner is not self._drawing], epoch)
            self._restart_processes()
        self._leave_out(before)
        self._measure()

    def draw(self) -> int | None:
        """Have samplers draw the epoch's order; return its length, which may be known by that only."""
        self._state.starts()
        if self._drawing is not None:
            self._drawing.draw()
        self._measure()
        return self.length

    def length_in(self, epoch: int) -> int | None:
        """`length` of another epoch, whole, as far as it can be told without drawing it."""
        batches, name = self.batches, f"limit_{self.stage}_batches"
        if batches is None or length_of(self.loader) is None or not depends_on_epoch(batches.users):
            return self.length
        own = batches.length_in(epoch)
        limit = resolve_limit(name, self.settings.limit(self.stage), own)
        return own if limit is None else min(own, limit)

    def _measure(self) -> None:
        if self.steady and self.batches is not None:
            before, self._measured = self._measured, (self.batches.sizes(), self._before)
            if before == self._measured:
                return
        self._own = own = None if self._unmeasured else length_of(self.loader)
        # fractions are of the longest part, so that all workers agree on them
        longest = own if self.batches is None or own is None else self.batches.longest_part()
        offset, count = batches_before(self._before, self.batch_size), self.share.count
        limit = resolve_limit(f"limit_{self.stage}_batches", self.settings.limit(self.stage), longest)
        if limit is not None and offset:
            limit = max(0, -(-(limit * count - offset) // count))
        self.length = limit if own is None else own if limit is None else min(own, limit)

    def _leave_out(self, before: Past) -> None:
        """Leave out the epoch's first batches, which groups of other sizes have done."""
        offset, count = batches_before(before, self.batch_size), self.share.count
        self._unmeasured = bool(offset) and self._state.goes_on(self._epoch or 0)  # lengths are of whole epochs
        if self.batches is None:
            if offset and not self._unmeasured:
                log.warning(
                    "The %s loader is read as it is on each worker (a stream, or an iterable of batches), and its "
                    "epoch was begun by another number of workers: the epoch begins anew.", self.stage,
                )  # fmt: skip
        elif self.batches.shard is not None and self.batches.share.count == 1:
            self.batches.shard.begin = samples_before(before, self.batch_size or 1)
        else:
            # batches of an own DistributedSampler are this worker's alone
            self.batches.begin = offset if self.batches.share.count > 1 else offset // count

    def _restart_processes(self) -> None:
        """Processes that persist have copies of a dataset, which do not hear of the epoch, and count on."""
        loader = self.reader
        if loader is None:
            return
        for name in set(kept_readers(self.loader)):  # made by the loader itself, in the epoch before
            self.close()
            self.loader.__dict__[name] = vars(self.source).get(name)
        if not loader.persistent_workers:
            return
        dataset = loader.dataset
        changes = self.iterable_dataset and begins_otherwise(dataset)
        own = library_of(dataset) not in STREAMS
        if (own and (changes or callable(getattr(dataset, "set_epoch", None)))) or shuffling_steps(dataset):
            self.close()

    # ---------------------------------------------------------------- reading

    def start(self, epoch: int, skip: int = 0, agree: Callable[[bool], bool] | None = None) -> Iterator[Any]:
        """Batches of `epoch` from batch `skip` on.

        `agree` makes parts of unknown length end together: see `LookAhead`.
        """
        if epoch != self._epoch:
            self.begin(epoch)
        if self._drawing is not None:
            self._drawing.skip_to(0)
        if not self._state.started:
            self.draw()
        position = self._state.resume(epoch, skip, self._before)
        if self.batches is not None and self._state.in_order:
            position = skip
            self.batches.skip_to(skip)
        if self.reader is not None:
            # seeds the loader's processes; the global generators are left to the training
            if not self.steady or self.reader.num_workers or self.reader.generator is self.source.generator:
                seed = derive_seed(self.seed, "processes", self.stage, self.share.index, epoch)
                self.reader.generator = torch.Generator().manual_seed(seed)
            if self._drawing is None:
                self._seed_requests(self.reader, seed, position)
        iterator = self._state.read(self._read(epoch, position))
        for _ in range(position, skip):  # a loader that cannot skip is replayed
            if next(iterator, END) is END:
                break
        if not self.ends_unannounced and self._state.stream is None:
            return iterator
        self._state.about_to_read()
        return LookAhead(iterator, agree if self.ends_unannounced else None, self._state.keep, skip)

    def _read(self, epoch: int, position: int) -> Iterator[Any]:
        """The loader's batches, with generators seeded where that is needed."""

        def seed(batch: int) -> int:
            # streams draw their order with the first
            own = () if batch == 0 and self.batches is None else (self.share.index,)
            return derive_seed(self.seed, "reader", self.stage, *own, epoch, batch)

        apart, reader = self._reads_apart(), self.reader
        again = self.stage == "train" and self.batches is None and self._state.stream is None
        if apart or self.share.readers > 1 or (again and read_again(self.loader, reader)):
            iterator = read_alike(self._iterate, seed, position)
            return iterator if apart is None else apart.watched(iterator)
        in_process = reader is None or not reader.num_workers
        if self._drawing is None and in_process and not position and not isinstance(self.loader, (list, tuple)):
            return begun_alike(self._iterate, seed(0))
        return self._iterate()

    def _reads_apart(self) -> Order | None:
        """Whether the user's way of reading may be ahead of what it gives, so that each batch is to have its own seed.

        A thread of the user's that reads is left alone, as it runs beside the training.
        """
        reader, drawing = self.reader, self._drawing
        plain = self.loader is reader and reads_plainly(reader)
        if drawing is None or reader is None or self.stage != "train" or plain:
            return None
        drawing.seeding = threading.get_ident()
        self._state.order = self._state.order or Order(self.loader, reader, drawing)
        return self._state.order

    def _seed_requests(self, loader: DataLoader[Any], seed: int, position: int) -> None:
        """Have the processes that read an iterable dataset draw from (seed, process, batch)."""
        if not loader.num_workers or not reads_plainly(loader):
            return
        batched = loader.batch_sampler is not None
        if self._requests is None:
            self._requests = Requests(loader.batch_size if batched else None)
        first = derive_seed(self.seed, "processes", self.stage, self._epoch or 0)
        self._requests.begin(seed, self._state.counts(position), first)
        if loader.worker_init_fn is None or isinstance(loader.worker_init_fn, BegunAlike):
            loader.worker_init_fn = BegunAlike(first)
        loader.__dict__["batch_sampler" if batched else "sampler"] = self._requests

    def _iterate(self) -> Iterator[Any]:
        if self.steady and not self.loader.num_workers:
            return iter(self.loader)  # which starts no process
        with garbage_left_alone(), control_c_left_alone(self.loader):
            reading: Iterator[Any] | None = None
            if self._stand_in is not None and self.reader is not None:
                self._stand_in.source = reading = iter(self.reader)
            iterator: Iterator[Any] = iter(self.loader)
        with contextlib.suppress(TypeError):
            self._reading = weakref.ref(iterator if reading is None else reading)
        return iterator

    def close(self) -> None:
        """End the loader's processes. Left to garbage collection, each may take 5 s, at any time."""
        kept = take_iterator(self.reader) if self.reader is not None else None
        own = [vars(self.loader)[name] for name in kept_readers(self.loader)] if self.reader is not None else []
        for iterator in (self._reading(), kept, *own):
            shutdown = getattr(iterator, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()
        if self.reader is not None:
            forget_iterator(self.reader)

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any] | None:
        """What a run that goes on from here needs besides the cursor, as plain values; None: nothing."""
        return self._state.state()

    def take_state(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` gave, when the epoch that it was taken in, or the next one, begins."""
        self._state.take(state, self.stage)
