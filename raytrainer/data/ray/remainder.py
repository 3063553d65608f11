"""What groups of other sizes have left of an epoch whose blocks come by: pieces, to be dealt out anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

from raytrainer.data.ray.dealing import Dealer, Piece, chosen, rows_done
from raytrainer.plan.seeds import derive_seed

__all__ = ["Windows", "left_over"]

T = TypeVar("T")


class Windows:
    """In which order a part takes its rows: as they come, or mixed within windows.

    Args:
        shuffle: As in `RayDataset`.
        batch_size: Rows of a batch; a window is a multiple.
        seed: The run's seed.
        epoch: The epoch.
        part: The part.
    """

    def __init__(self, shuffle: bool | int, batch_size: int, seed: int, epoch: int, part: int) -> None:
        self.rows = 0 if isinstance(shuffle, bool) else max(batch_size, shuffle // batch_size * batch_size)
        self._generator = torch.Generator().manual_seed(derive_seed(seed, "window", epoch, part))

    def order(self, rows: int) -> torch.Tensor:
        """The order of the next `rows` rows, from the beginning of a window on; as they come, if there are no windows.

        Only the part's last rows may end within a window.
        """
        if not self.rows:
            return torch.arange(rows)
        windows = [
            start + torch.randperm(min(self.rows, rows - start), generator=self._generator)
            for start in range(0, rows, self.rows)
        ]
        return torch.cat(windows) if windows else torch.arange(0)


def left_over(
    pieces: Iterable[Piece[T]],
    batches: int,
    batch_size: int,
    drop_last: bool,
    orders: list[Windows],
) -> Iterator[Piece[T]]:
    """What is left of `pieces` when they have been dealt out and each part has done its first batches.

    Args:
        pieces: What there was.
        batches: Batches that each part has done.
        batch_size: Rows of a batch.
        drop_last: Whether rows that fill no batch on every part are dropped.
        orders: In which order each part took its rows.
    """
    dealer = Dealer[T](len(orders))
    parts = [_Part[T](batches, batch_size, drop_last, order) for order in orders]
    for piece in pieces:
        for part, dealt in dealer.add(piece):
            yield from parts[part].take(dealt)
    for part, dealt in dealer.finish():
        yield from parts[part].take(dealt)
    for own in parts:
        yield from own.end(min(dealer.totals), max(dealer.totals))


class _Part(Generic[T]):
    """One part: rows that are surely done vanish, those in doubt are held, and the others pass.

    In doubt is the window of the last row done. Only when one more row has come after that window is it known that its
    batches were full ones. If none comes, the part has ended, and its last full batch may have been cut in two (see
    `tail_sizes`).
    """

    def __init__(self, batches: int, batch_size: int, drop_last: bool, order: Windows) -> None:
        self.batches, self.batch_size, self.drop_last, self.order = batches, batch_size, drop_last, order
        self.done = batches * batch_size
        window = order.rows or 1
        self.first = max(0, self.done - 1) // window * window  # row that begins the window in doubt
        self.last = self.first + window
        self.came = 0
        self.held: list[Piece[T]] = []
        self.settled = batches == 0

    def take(self, piece: Piece[T]) -> Iterator[Piece[T]]:
        if self.settled:
            yield piece
            return
        begin = max(0, self.first - self.came)
        self.came += piece.rows
        if begin < piece.rows:
            self.held.append(piece.cut(begin, piece.rows))
        if self.came >= self.last and self.came > self.done:
            yield from self._settle(self.done)

    def end(self, shortest: int, longest: int) -> Iterator[Piece[T]]:
        """No more rows; parts have `shortest` to `longest`."""
        if not self.settled:
            size = self.batch_size
            cut = rows_done(self.came, self.batches, shortest, longest, size, self.drop_last)
            yield from self._settle(min(self.done, cut))

    def _settle(self, done: int) -> Iterator[Piece[T]]:
        self.settled = True
        rows = [piece.rows for piece in self.held]
        if self.order.rows:
            self.order.order(self.first)  # draws what came before
        window = self.order.order(min(self.last - self.first, sum(rows)))
        left = window[max(0, done - self.first) :].sort().values
        # rows that follow each other stay together
        edges = (left.diff() != 1).nonzero().flatten() + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in left.tensor_split(edges) if len(run)]
        for number, start, stop in chosen(rows, [*runs, (len(window), sum(rows))]):
            yield self.held[number].cut(start, stop)
        self.held.clear()
