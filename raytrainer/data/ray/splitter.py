"""`Splitter`: executes a Ray Dataset and deals its blocks, in an actor or in the driver's process."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from raytrainer.data.ray.dealing import Dealer, Piece, mixed
from raytrainer.errors import DataError
from raytrainer.plan.seeds import derive_seed
from raytrainer.plan.steps_and_epochs import size_of
from raytrainer.private import ray_private

__all__ = ["Reading", "Splitter", "SplitterLost"]

#: Blocks that a shuffle in windows holds, to draw the next one from.
BLOCK_WINDOW = 4

#: Size of blocks to ask Ray Data for, at most.
BLOCK_BYTES = 16 << 20

#: Pieces handed over in one answer, at most; more if together they have fewer rows than `FEW_ROWS`.
PIECES = 16
FEW_ROWS = 4096


@dataclass(frozen=True)
class Reading:
    """What workers read: one pass over a dataset, or what is left of it.

    Args:
        epoch: The epoch.
        seed: The run's seed.
        shuffle: As in `RayDataset`.
        before: What groups of other sizes have done of the epoch: (parts, batches of each, their size).
    """

    epoch: int
    seed: int
    shuffle: bool | int
    before: tuple[tuple[int, ...], ...] = ()


class SplitterLost(DataError):
    """The process that executes a dataset is gone. The run goes on with another one, as after a lost worker."""


class Splitter:
    """Executes a dataset once an epoch and deals its blocks to the workers that ask.

    It works when asked, so workers that stop asking leave nothing hanging: the first one to ask for the next epoch ends
    this one.

    Args:
        training: Whether there is likely to be another epoch.
        batch_size: Rows of a batch.
        drop_last: Whether rows that fill no batch on every worker are dropped.
    """

    def __init__(self, training: bool, batch_size: int, drop_last: bool) -> None:
        self.training, self.batch_size, self.drop_last = training, batch_size, drop_last
        self.dataset: Any = None
        self.token: tuple[int, int] = (-1, -1)
        self.dealer: Dealer[Any] | None = None
        self.pieces: Iterator[Piece[Any]] = iter(())
        self.ready: list[deque[Piece[Any]]] = []
        self.ended = True
        self.failure: Exception | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="raytrainer-data")
        self._ahead: tuple[Reading, Future[Any]] | None = None

    def begin(self, training: bool, batch_size: int, drop_last: bool, session: int) -> None:
        """Serve another run, as if made for it; whoever asks for a session up to this one belongs to an earlier run."""
        Splitter.__init__(self, training, batch_size, drop_last)
        self.token = session, 0

    def rest(self) -> None:
        """Wait for another run, without anything of this one."""
        self.dataset, self.failure = None, None
        self.close()
        if not gc.get_freeze_count():
            gc.freeze()  # what has been imported need not be looked through at each run's end

    def answer(self) -> None:
        """All that it was told before has been obeyed."""

    def take(self, dataset: Any) -> None:
        """Say what is to be executed: a `ray.data.Dataset`."""
        ray_private.quiet_data_logs()
        self.dataset = type(dataset).copy(dataset, _deep_copy=True)
        self.dataset.context.enable_progress_bars = False
        self.dataset.context.execution_options.preserve_order = True  # the same order for the same seed
        # smaller blocks come sooner: the first one of an epoch above all
        largest = self.dataset.context.target_max_block_size
        self.dataset.context.target_max_block_size = min(largest or BLOCK_BYTES, BLOCK_BYTES)

    def next(
        self, token: tuple[int, int], part: int, count: int, wanted: Reading
    ) -> tuple[list[Piece[Any]], tuple[int, int] | None]:
        """Pieces for one part, at least one but at the end; and at the end the rows of the shortest and longest part.

        Raises:
            DataError: The workers have gone on to a later epoch, or a later run has begun.
            Exception: Whatever the dataset's execution raised.
        """
        if token < self.token:
            raise DataError("a worker asked for data of an epoch or a run that is over")
        try:
            if token > self.token:
                self.token, self.failure = token, None
                self._open(count, wanted)
            if self.failure is None:
                return self._next(part, wanted)
        except Exception as error:
            self.failure = error
        raise self.failure  # to every part at once, rather than failing again for each

    def _next(self, part: int, wanted: Reading) -> tuple[list[Piece[Any]], tuple[int, int] | None]:
        assert self.dealer is not None
        while not self.ready[part] and not self.ended:
            piece = next(self.pieces, None)
            if piece is None:
                self.ended = True
                self._read_ahead(replace(wanted, epoch=wanted.epoch + 1, before=()))
            dealt = self.dealer.finish() if piece is None else self.dealer.add(piece)
            for receiver, own in dealt:
                self.ready[receiver].append(own)
        ready = self.ready[part]
        pieces: list[Piece[Any]] = []
        rows = 0
        while ready and (len(pieces) < PIECES or rows < FEW_ROWS):
            pieces.append(ready.popleft())
            rows += pieces[-1].rows
        over = self.ended and not ready
        return pieces, (min(self.dealer.totals), max(self.dealer.totals)) if over else None

    def close(self) -> None:
        """End what runs. An execution that is alive when Ray ends would start another Ray."""
        self.pieces, self.dealer = iter(()), None
        self.ready.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
        gc.collect()

    def _open(self, count: int, wanted: Reading) -> None:
        self.pieces = iter(())
        self.ready.clear()
        self.dealer = None
        if not self.ended:
            gc.collect()  # ends the execution of an epoch that was left early
        pieces = None
        if self._ahead is not None:
            ahead, future = self._ahead
            self._ahead = None
            opened = future.result()
            if ahead == wanted:
                pieces = opened
            del opened, future
        self.pieces = pieces if pieces is not None else self._execute(wanted)
        self.ended = False
        self.dealer, self.ready = Dealer(count), [deque() for _ in range(count)]

    def _read_ahead(self, wanted: Reading) -> None:
        """Begin the next epoch's execution while workers are busy with the last blocks of this one."""
        if self.training:
            self._ahead = wanted, self._pool.submit(self._execute, wanted)

    def _execute(self, wanted: Reading) -> Iterator[Piece[Any]]:
        dataset, drawn = self.dataset, derive_seed(wanted.seed, "shuffle", wanted.epoch)
        if wanted.shuffle is True:
            dataset = dataset.random_shuffle(seed=drawn % 2**32)
        blocks = ray_private.internal_blocks(dataset)
        if not isinstance(wanted.shuffle, bool):
            blocks = mixed(blocks, BLOCK_WINDOW, drawn)
        pieces: Iterator[Piece[Any]] = (Piece(ref, 0, rows) for ref, rows in blocks)
        if wanted.before:
            from raytrainer.data.ray.remainder import Windows, left_over  # which imports torch
        for count, batches, *past in wanted.before:
            size = size_of(past, self.batch_size)
            orders = [Windows(wanted.shuffle, size, wanted.seed, wanted.epoch, i) for i in range(count)]
            pieces = left_over(pieces, batches, size, self.drop_last, orders)
        return pieces
