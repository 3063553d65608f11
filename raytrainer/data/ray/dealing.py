"""Who gets which rows: pure arithmetic, so that every row reaches one worker and all workers end together.

Two ways: `spans` where all rows can be reached by number; `Dealer` where blocks come by and their number is unknown.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from raytrainer.plan.steps_and_epochs import Past, size_of

__all__ = [
    "Dealer",
    "Piece",
    "Span",
    "batches_of_each",
    "chosen",
    "evaluation_spans",
    "mixed",
    "rows_done",
    "spans_left",
    "tail_sizes",
    "training_spans",
    "within",
]

T = TypeVar("T")

#: Rows by number: (start, stop).
Span = tuple[int, int]


def batches_of_each(shortest: int, longest: int, batch_size: int, drop_last: bool) -> int:
    """Training batches of every worker, when parts have `shortest` to `longest` rows, a difference of at most one.

    A part that is one row short cuts its last full batch in two where that gives it as many batches as the others.
    Where it cannot (batches of one row), the others leave their last row out.
    """
    if drop_last:
        return shortest // batch_size
    most = -(-longest // batch_size)
    return most if shortest >= most else -(-shortest // batch_size)


def tail_sizes(rows: int, batches: int, batch_size: int) -> list[int]:
    """Sizes of `batches` batches out of `rows` rows: full ones, and what is left; the last two share if it must be."""
    sizes = [batch_size] * (batches - 1)
    last = rows - sum(sizes)
    if batches > 1 and last == 0:
        sizes[-1], last = batch_size - 1, 1
    return [*sizes, min(batch_size, last)] if batches else []


def rows_done(rows: int, batches: int, shortest: int, longest: int, batch_size: int, drop_last: bool) -> int:
    """Rows in the first `batches` batches of a part of `rows` rows, when parts have `shortest` to `longest`."""
    return sum(tail_sizes(rows, batches_of_each(shortest, longest, batch_size, drop_last), batch_size)[:batches])


def training_spans(rows: int, rank: int, count: int, batch_size: int, drop_last: bool) -> list[Span]:
    """The batches of one of `count` workers, as (start, stop) in the epoch's order of `rows` rows.

    Batches are dealt in turn, so that after k full batches on each worker the first k * count * batch_size rows are
    done: another number of workers goes on with what `spans_left` says. The rows that fill no batch on every worker are
    spread evenly.
    """
    batches = batches_of_each(rows // count, -(-rows // count), batch_size, drop_last)
    full = rows // (count * batch_size)
    spread = batches - full  # last batches of uneven size: 0 or 1 ...
    rest = rows - full * count * batch_size
    if spread and rest < count:  # ... or 2, with a full round broken up to give everyone a row
        full, spread, rest = full - 1, 2, rest + count * batch_size
    spans = [((i * count + rank) * batch_size, (i * count + rank + 1) * batch_size) for i in range(full)]
    if spread:
        base, extra = divmod(rest, count)
        start = rows - rest + rank * base + min(rank, extra)
        for size in tail_sizes(base + (rank < extra), spread, batch_size):
            spans.append((start, start + size))
            start += size
    return spans


def spans_left(rows: int, before: Past, batch_size: int, drop_last: bool) -> list[Span]:
    """What groups of other sizes have left of an epoch's order, in which each was dealt `training_spans`.

    Args:
        rows: Rows of the epoch.
        before: What these groups have done.
        batch_size: Rows of a batch, where that is not said there.
        drop_last: As in `training_spans`.
    """
    left = [(0, rows)] if rows else []
    for count, batches, *past in before:
        there, size = sum(stop - start for start, stop in left), size_of(past, batch_size)
        parts = (training_spans(there, rank, count, size, drop_last)[:batches] for rank in range(count))
        at, kept = 0, list[Span]()
        for start, stop in sorted(span for part in parts for span in part):
            if at < start:
                kept.append((at, start))
            at = stop
        left = within(left, [*kept, (at, there)] if at < there else kept)
    return left


def within(whole: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Positions in what `whole` picks, as positions in what it picks from.

    Example:
        Of rows 10-15 and 20-25, the rows 4-7 are rows 14-15 and 20-22.
    """
    parts = chosen([stop - start for start, stop in whole], spans)
    return [(whole[i][0] + start, whole[i][0] + stop) for i, start, stop in parts]


def chosen(lengths: Sequence[int], spans: Iterable[Span]) -> Iterator[tuple[int, int, int]]:
    """Which rows of which of several things, laid end to end, ascending `spans` name: (number, start, stop)."""
    number = at = 0
    for start, stop in spans:
        while number < len(lengths) and start < stop:
            end = at + lengths[number]
            if start < end:
                yield number, start - at, min(stop, end) - at
                start = min(stop, end)
            if end > stop:
                break
            number, at = number + 1, end


def evaluation_spans(rows: int, rank: int, count: int, batch_size: int) -> list[Span]:
    """Every `count`-th batch: each is what one worker alone would see, and every row is in exactly one."""
    starts = range(rank * batch_size, rows, count * batch_size)
    return [(start, min(start + batch_size, rows)) for start in starts]


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Rows `start` to `stop` of a block."""

    block: T
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def cut(self, start: int, stop: int) -> Piece[T]:
        """Rows `start` to `stop` of these."""
        return Piece(self.block, self.start + start, self.start + stop)


class Dealer(Generic[T]):
    """Deals blocks of known size to `count` parts, whole as long as it goes, so that each crosses the network once.

    It holds back as many rows as are needed to make all parts equal in the end; then the parts differ by one row at
    most, the longer ones first, and nothing is dropped. (`streaming_split(equal=True)` drops the remainder;
    `equal=False` leaves parts a block apart.) Depends on the order of blocks alone, not on who asks first.
    """

    def __init__(self, count: int) -> None:
        self.totals = [0] * count
        self.held: deque[Piece[T]] = deque()
        self.held_rows = 0

    def add(self, piece: Piece[T]) -> Iterator[tuple[int, Piece[T]]]:
        """Take a block, or a piece of one; yield (part, piece) for whatever can be dealt now."""
        if piece.rows:
            self.held.append(piece)
            self.held_rows += piece.rows
        while self.held:
            part = self.totals.index(min(self.totals))
            size = self.held[0].rows
            highest = max(*self.totals, self.totals[part] + size)
            missing = highest * len(self.totals) - sum(self.totals) - size
            if self.held_rows - size < missing:
                return
            yield part, self._hand(part, size)

    def finish(self) -> Iterator[tuple[int, Piece[T]]]:
        """No more blocks: deal what is held, making the parts equal."""
        base, extra = divmod(sum(self.totals) + self.held_rows, len(self.totals))
        for part in range(len(self.totals)):
            while (wanted := base + (part < extra) - self.totals[part]) > 0:
                yield part, self._hand(part, wanted)

    def _hand(self, part: int, rows: int) -> Piece[T]:
        front = self.held.popleft()
        piece = front
        if front.rows > rows:
            piece = front.cut(0, rows)
            self.held.appendleft(front.cut(rows, front.rows))
        self.totals[part] += piece.rows
        self.held_rows -= piece.rows
        return piece


def mixed(items: Iterable[T], window: int, seed: int) -> Iterator[T]:
    """The items in another order: each is drawn from the next `window` that have not been handed out."""
    generator, waiting = random.Random(seed), list[T]()
    for item in items:
        waiting.append(item)
        if len(waiting) >= window:
            yield waiting.pop(generator.randrange(len(waiting)))
    while waiting:
        yield waiting.pop(generator.randrange(len(waiting)))
