"""What is left of an epoch whose blocks come by, by brute force: what workers do of it is played here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest

from raytrainer.data.ray.dealing import Dealer, Piece, batches_of_each, tail_sizes
from raytrainer.data.ray.remainder import Windows, left_over

SEED, EPOCH = 3, 2


def blocks(rows: int, generator: random.Random) -> Iterator[Piece[int]]:
    """Pieces of uneven size, whose block is the number of its first row."""
    start = 0
    while start < rows:
        size = min(rows - start, generator.randint(1, 12))
        yield Piece(start, 0, size)
        start += size


def rows_of(piece: Piece[int]) -> list[int]:
    return list(range(piece.block + piece.start, piece.block + piece.stop))


def orders(shuffle: bool | int, size: int, count: int) -> list[Windows]:
    return [Windows(shuffle, size, SEED, EPOCH, part) for part in range(count)]


def play(
    pieces: Iterable[Piece[int]], count: int, size: int, shuffle: bool | int, drop_last: bool
) -> list[list[list[int]]]:
    """Batches of each worker, as a worker cuts them from what it is dealt."""
    dealer, got = Dealer[int](count), [list[int]() for _ in range(count)]
    for piece in pieces:
        for part, own in dealer.add(piece):
            got[part] += rows_of(own)
    for part, own in dealer.finish():
        got[part] += rows_of(own)
    batches = batches_of_each(min(dealer.totals), max(dealer.totals), size, drop_last)
    played = []
    for rows, order in zip(got, orders(shuffle, size, count), strict=True):
        mixed = [rows[i] for i in order.order(len(rows)).tolist()]
        cut, at = [], 0
        for length in tail_sizes(len(mixed), batches, size):
            cut.append(mixed[at : at + length])
            at += length
        played.append(cut)
    return played


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, 2, 7])
def test_no_row_twice_and_none_missed(shuffle: bool | int, drop_last: bool) -> None:
    for rows in (0, 1, 5, 8, 13, 24, 37, 60):
        for count, size in ((1, 2), (2, 2), (2, 3), (3, 4), (4, 3), (2, 5)):
            generator = random.Random(rows * count * size)
            there = list(blocks(rows, generator))
            played = play(there, count, size, shuffle, drop_last)
            for done in range(len(played[0]) + 1):
                seen = [row for worker in played for batch in worker[:done] for row in batch]
                rest = list(left_over(there, done, size, drop_last, orders(shuffle, size, count)))
                left = [row for piece in rest for row in rows_of(piece)]
                assert sorted(seen + left) == list(range(rows)), (rows, count, size, done)
                # and another group after that
                again = play(rest, 2, size, shuffle, drop_last)
                done_again = len(again[0]) // 2
                seen += [row for worker in again for batch in worker[:done_again] for row in batch]
                end = left_over(rest, done_again, size, drop_last, orders(shuffle, size, 2))
                assert sorted(seen + [row for piece in end for row in rows_of(piece)]) == list(range(rows))


def test_blocks_are_asked_for_as_they_are_needed() -> None:
    """What nobody has begun is passed on at once, rather than when all is known."""
    asked = []

    def coming() -> Iterator[Piece[int]]:
        for piece in (Piece(start, 0, 10) for start in range(0, 1000, 10)):
            asked.append(piece.block)
            yield piece

    rest = left_over(coming(), 3, 4, False, orders(8, 4, 2))
    next(rest)
    assert len(asked) < 8
