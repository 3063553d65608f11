"""`RayFeed`: a Ray Dataset as a worker reads it: its share, in this epoch's order, cut into batches.

Small batches are cut from large reads (`READ_BYTES`), which a thread prepares ahead. Without it batches of 64 rows
would cost several times what their copying does.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from raytrainer.data.look_ahead import LookAhead
from raytrainer.data.ray.columns import Columns, cut, finished, joined, picked, pinned, require_one_type, row_bytes
from raytrainer.data.ray.dealing import (
    Span,
    batches_of_each,
    evaluation_spans,
    rows_done,
    spans_left,
    tail_sizes,
    training_spans,
    within,
)
from raytrainer.data.ray.remainder import Windows
from raytrainer.data.ray.row_order import RowOrder
from raytrainer.data.ray.splitter import Reading
from raytrainer.data.sharding import Share
from raytrainer.errors import DataError
from raytrainer.plan.seeds import derive_seed
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import Past, batches_before, resolve_limit, size_of

if TYPE_CHECKING:
    from raytrainer.data.first_batches import Fingerprint
    from raytrainer.data.ray.blocks import KeptBlocks, StreamedBlocks

__all__ = ["RayFeed"]

log = logging.getLogger("raytrainer")

T = TypeVar("T")

#: Bytes to read at once: large enough that the cost of a read disappears, small enough to stay in a CPU's cache.
READ_BYTES = 8 << 20

#: Rows in one read, and the sizes of the batches to cut from it.
Read = tuple[Columns, list[int]]


class RayFeed:
    """One Ray Dataset on one worker; to the loops the same as `Feed`.

    Args:
        blocks: The dataset, as the driver has prepared it.
        stage: "train", "val", "test" or "predict".
        share: This worker's part.
        seed: The run's seed.
        settings: For the limit.

    Raises:
        DataError: No batch for this worker in training.
    """

    def __init__(
        self, blocks: KeptBlocks | StreamedBlocks, stage: str, share: Share, seed: int, settings: Settings
    ) -> None:
        if share.readers > 1 and not blocks.kept:
            raise DataError(
                f"the {stage} dataset is executed in each epoch and dealt out to the workers, but with this strategy "
                f"{share.readers} of them read the same batches: pass RayDataset(..., keep_in_memory=True), a "
                f'DataLoader, or strategy="ddp".'
            )
        self.blocks, self.stage, self.share, self.seed = blocks, stage, share, seed
        self.source = blocks.source
        self.training = stage == "train"
        self.watched: Fingerprint | None = None  # rows are dealt out here, so there is nothing to find out
        self.shuffle = self.source.shuffle if self.training and not settings.overfit else False
        self.ends_unannounced = blocks.total is None
        self.nothing = blocks.total == 0  # on any worker
        self.may_miss = self.source.collate_fn is not None  # batches may be None
        self.divisible = True
        self._limit = settings.limit(stage)
        self._pin = settings.on_gpu
        self._starts = 0
        self._types: dict[str, torch.dtype] = {}  # of columns read so far
        self.length: int | None
        self.begin(0)

    def begin(self, epoch: int, before: Past = ()) -> None:
        """Leave out what groups of other sizes have done of the epoch."""
        self._before = tuple(before)
        offset = batches_before(before, self.source.batch_size)
        total, name = self.blocks.total, f"limit_{self.stage}_batches"
        if total is None:
            limit = resolve_limit(name, self._limit, None)
        else:
            longest = self._batches_of(total, 0)
            limit = resolve_limit(name, self._limit, longest)
        if self._limit == 1.0 and isinstance(self._limit, float):
            limit = None  # batches that were done may have been smaller than those to come
        elif limit is not None and offset:
            limit = max(0, -(-(limit * self.share.count - offset) // self.share.count))
        own = None if total is None else self._batches_of(self._rows_left(total), self.share.index)
        self.length = own if limit is None else limit if own is None else min(own, limit)
        if self.nothing and self._limit != 0 and self.share.index == 0:
            log.warning("The %s dataset has no row. Without any, this stage does nothing.", self.stage)
        elif self.training and own == 0 and self._limit != 0 and not offset:
            raise DataError(
                f"the training dataset has no batch for each of {self.share.count} worker(s): it has {total} row(s), "
                f"batch_size={self.source.batch_size}, drop_last={self.source.drop_last}. Give it more data, a smaller "
                f"batch_size, drop_last=False or fewer workers."
            )

    def draw(self) -> int | None:
        """The epoch's length; its order is drawn as it is read."""
        return self.length

    def length_in(self, epoch: int) -> int | None:
        """`length` of another epoch: the same."""
        return self.length

    def state(self) -> None:
        """The cursor (epoch, batch) is enough to go on from."""

    def take_state(self, state: Any) -> None:
        """See `state`."""

    def _rows_left(self, rows: int) -> int:
        """Rows of the epoch that groups of other sizes have left."""
        own, drop_last = self.source.batch_size, self.source.drop_last
        if self.blocks.kept:
            return sum(stop - start for start, stop in spans_left(rows, self._before, own, drop_last))
        for parts, batches, *past in self._before:
            size = size_of(past, own)
            shortest, longer = divmod(rows, parts)
            longest = shortest + (longer > 0)
            done = [rows_done(n, batches, shortest, longest, size, drop_last) for n in (shortest, longest)]
            rows -= done[0] * (parts - longer) + done[1] * longer
        return rows

    def _batches_of(self, rows: int, rank: int) -> int:
        count, size = self.share.count, self.source.batch_size
        if self.training:
            return batches_of_each(rows // count, -(-rows // count), size, self.source.drop_last)
        if self.blocks.kept:
            return len(evaluation_spans(rows, rank, count, size))
        return -(-(rows // count + (rank < rows % count)) // size)

    def refuse_nothing(self, epoch: int) -> None:
        """There was no batch in a training epoch, which would otherwise train for ever."""
        raise DataError(f"the {self.stage} dataset gave no batch to rank {self.share.index} in epoch {epoch}.")

    def start(self, epoch: int, skip: int = 0, agree: Callable[[bool], bool] | None = None) -> Iterator[Any]:
        """Batches of `epoch` from batch `skip` on. All workers have equally many in training, so none need agree."""
        reads = self._kept_reads(epoch, skip) if self.blocks.kept else self._streamed_reads(epoch)
        batches = self._cut(reads, 0 if self.blocks.kept else skip)
        return LookAhead(batches, None) if self.ends_unannounced else batches

    def _cut(self, reads: Iterator[Read], skip: int) -> Iterator[Any]:
        """Batches out of large reads, leaving the first `skip` out."""
        depth = self.source.prefetch_batches
        typed = ((finished(self._alike(columns), self.source), sizes) for columns, sizes in reads)
        if self._pin and depth:  # in the loop itself it would cost what it saves
            typed = ((pinned(columns), sizes) for columns, sizes in typed)
        for columns, sizes in _ahead(typed, min(depth, 2)) if depth else typed:
            start = 0
            for size in sizes:
                batch = cut(columns, start, start + size)
                start += size
                if skip:
                    skip -= 1
                    continue
                yield batch if self.source.collate_fn is None else self.source.collate_fn(batch)

    def _alike(self, columns: Columns) -> Columns:
        """The columns, which must not be integers in some batches and floating-point numbers in others."""
        for name, values in columns.items():
            if isinstance(values, Tensor):
                require_one_type(name, {values.dtype, self._types.setdefault(name, values.dtype)})
        return columns

    def _rows_per_read(self, columns: Columns, rows: int) -> int:
        size = self.source.batch_size
        return max(size, READ_BYTES // row_bytes(columns, rows) // size * size)

    # ---------------------------------------------------------------- blocks in memory

    def _kept_reads(self, epoch: int, skip: int) -> Iterator[Read]:
        blocks, count, size, index = self.blocks, self.share.count, self.source.batch_size, self.share.index
        assert blocks.kept and blocks.total is not None
        left = spans_left(blocks.total, self._before, size, self.source.drop_last)
        rows = sum(stop - start for start, stop in left)
        if self.training:
            spans = training_spans(rows, index, count, size, self.source.drop_last)
        else:
            spans = evaluation_spans(rows, index, count, size)
        spans = spans[skip:]
        store: RowOrder = blocks.order(self.shuffle, derive_seed(self.seed, "shuffle", epoch))
        if not spans:
            return
        first, length = store.sample()
        most = self._rows_per_read(first, length)
        group: list[Span] = []
        together = 0
        for span in spans:
            group.append(span)
            together += span[1] - span[0]
            if together >= most:
                yield store.read(within(left, group)), [stop - start for start, stop in group]
                group, together = [], 0
        if group:
            yield store.read(within(left, group)), [stop - start for start, stop in group]

    # ---------------------------------------------------------------- blocks that come by

    def _streamed_reads(self, epoch: int) -> Iterator[Read]:
        """What is dealt to this worker; a batch is held back until it is known not to be the last full one."""
        blocks, size = self.blocks, self.source.batch_size
        assert not blocks.kept
        self._starts += 1
        order = Windows(self.shuffle, size, self.seed, epoch, self.share.index)
        parts: deque[Columns] = deque()
        waiting = passed = shortest = longest = 0
        for columns, rows, ends in blocks.pieces(
            self._starts, self.share, Reading(epoch, self.seed, self.shuffle, self._before)
        ):
            if ends is not None:
                shortest, longest = ends
                break
            parts.append(columns)
            waiting += rows
            least = order.rows or size
            full = max(least, self._rows_per_read(columns, rows) // least * least)
            # the first read of an epoch is small, for it is waited for
            while waiting >= (most := full if passed else least) + size:
                yield _ordered(_taken(parts, most), order), [size] * (most // size)
                waiting -= most
                passed += most
        sizes = self._last_sizes(waiting, passed, shortest, longest)
        if self.training and not passed and not sizes and not self._before:
            raise DataError(
                f"the training dataset has no batch for each of {self.share.count} worker(s): rank {self.share.index} "
                f"got {waiting} row(s), batch_size={size}, drop_last={self.source.drop_last}."
            )
        if sizes:
            yield _ordered(_taken(parts, waiting), order), sizes

    def _last_sizes(self, rows: int, passed: int, shortest: int, longest: int) -> list[int]:
        size = self.source.batch_size
        if not self.training:
            return tail_sizes(rows, -(-rows // size), size)
        batches = batches_of_each(shortest, longest, size, self.source.drop_last)
        return tail_sizes(rows, batches - passed // size, size)


def _ordered(columns: Columns, order: Windows) -> Columns:
    return picked(columns, order.order(_rows(columns))) if order.rows else columns


def _rows(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _taken(parts: deque[Columns], rows: int) -> Columns:
    """The first `rows` rows of `parts`, which lose them; copied."""
    found: list[Columns] = []
    while rows:
        front = parts.popleft()
        length = _rows(front)
        if length > rows:
            parts.appendleft(cut(front, rows, length))
            front, length = cut(front, 0, rows), rows
        found.append(front)
        rows -= length
    return joined(found)


_END = object()


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, `depth` of them prepared ahead by a thread that ends with the iteration."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="raytrainer-data")
    try:
        pending: deque[Future[Any]] = deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
