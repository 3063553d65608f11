"""Every row to one worker, and equally many batches for all: by brute force over small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from raytrainer.data.ray.dealing import (
    Dealer,
    Piece,
    batches_of_each,
    evaluation_spans,
    mixed,
    spans_left,
    tail_sizes,
    training_spans,
    within,
)

CASES = list(itertools.product(range(60), (1, 2, 3, 4), (1, 2, 3, 5)))


def rows_of(spans: list[tuple[int, int]]) -> list[int]:
    return [row for start, stop in spans for row in range(start, stop)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_training_spans(drop_last: bool) -> None:
    for rows, count, size in CASES:
        parts = [training_spans(rows, rank, count, size, drop_last) for rank in range(count)]
        batches = batches_of_each(rows // count, -(-rows // count), size, drop_last)
        assert [len(part) for part in parts] == [batches] * count
        seen = sorted(row for part in parts for row in rows_of(part))
        assert len(seen) == len(set(seen))
        lengths = {stop - start for part in parts for start, stop in part}
        if drop_last:
            assert lengths <= {size} and rows - len(seen) < count * size
        else:
            assert all(0 < length <= size for length in lengths)
            # with batches of one row, a remainder cannot be shared
            assert rows - len(seen) < count if size == 1 or rows < count else seen == list(range(rows))


@pytest.mark.parametrize("drop_last", [False, True])
def test_groups_of_other_sizes_go_on(drop_last: bool) -> None:
    """After k batches on each worker, another number of workers does the rest, wherever k is; and once more."""
    for rows, count, size in CASES:
        for done in range(batches_of_each(rows // count, -(-rows // count), size, drop_last)):
            seen: list[int] = []
            past: list[tuple[int, int]] = []
            for workers, batches in ((count, done), (count % 4 + 1, 1), (2, 1000)):
                left = spans_left(rows, past, size, drop_last)
                there = len(rows_of(left))
                for rank in range(workers):
                    spans = training_spans(there, rank, workers, size, drop_last)[:batches]
                    seen += rows_of(within(left, spans))
                past.append((workers, batches))
            assert len(seen) == len(set(seen))
            dropped = sorted(set(range(rows)) - set(seen))
            if drop_last:
                assert len(dropped) < 2 * size
            elif size > 1:
                assert len(dropped) < 2  # one row is too few for the two workers of the last group
            assert rows_of(spans_left(rows, past, size, drop_last)) == dropped


def test_groups_with_other_batch_sizes_go_on() -> None:
    done = [row for rank in range(2) for row in rows_of(training_spans(30, rank, 2, 3, False)[:2])]
    assert sorted(done + rows_of(spans_left(30, [(2, 2, 3)], 5, False))) == list(range(30))


def test_rows_in_the_middle_are_left_whole() -> None:
    """Two workers of which each has cut its last full batch in two: rows 0-1 and 3-4 are done, 2 and 5 are not."""
    assert [training_spans(6, rank, 2, 3, False) for rank in range(2)] == [[(0, 3)], [(3, 6)]]
    assert [training_spans(7, rank, 2, 3, False) for rank in range(2)] == [[(0, 3), (3, 4)], [(4, 6), (6, 7)]]
    assert spans_left(7, [(2, 1)], 3, False) == [(3, 4), (6, 7)]


def test_evaluation_spans() -> None:
    for rows, count, size in CASES:
        parts = [evaluation_spans(rows, rank, count, size) for rank in range(count)]
        assert sorted(row for part in parts for row in rows_of(part)) == list(range(rows))


def test_dealer() -> None:
    for rows, count, size in CASES:
        generator, dealer = random.Random(rows * count * size), Dealer[int](count)
        got: list[list[int]] = [[] for _ in range(count)]
        start = 0
        while start < rows:
            block = min(rows - start, generator.randint(0, 12))
            for part, piece in dealer.add(Piece(start, 0, block)):
                got[part] += _rows(piece)
            start += block
        for part, piece in dealer.finish():
            got[part] += _rows(piece)
        assert sorted(row for part in got for row in part) == list(range(rows))
        assert [len(part) for part in got] == [rows // count + (rank < rows % count) for rank in range(count)]
        batches = batches_of_each(rows // count, -(-rows // count), size, False)
        for part_rows in (len(part) for part in got):
            sizes = tail_sizes(part_rows, batches, size)
            assert len(sizes) == batches and all(length > 0 for length in sizes)
            assert size == 1 or not batches or sum(sizes) == part_rows


def _rows(piece: object) -> list[int]:
    return list(range(piece.block + piece.start, piece.block + piece.stop))  # type: ignore[attr-defined]


def test_dealer_deals_whole_blocks_while_it_can() -> None:
    dealer = Dealer[str](2)
    dealt = [item for name in "abcdefg" for item in dealer.add(Piece(name, 0, 10))]
    assert [(part, piece.block, piece.rows) for part, piece in dealt] == [
        (part, name, 10) for part, name in zip([0, 1, 0, 1, 0, 1], "abcdef", strict=True)
    ]
    assert [(part, piece.start, piece.stop) for part, piece in dealer.finish()] == [(0, 0, 5), (1, 5, 10)]


def test_mixed() -> None:
    assert sorted(mixed(range(20), 5, 1)) == list(range(20))
    assert list(mixed(range(20), 5, 1)) == list(mixed(range(20), 5, 1)) != list(mixed(range(20), 5, 2))
    assert all(item <= place + 5 for place, item in enumerate(mixed(range(20), 5, 1)))
