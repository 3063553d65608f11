"""`StopBoard`: the last batch is one that every worker can still end with."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch.distributed as dist

from raytrainer.errors import RaytrainerError
from raytrainer.strategies import stop_board
from raytrainer.strategies.stop_board import StopBoard


@pytest.fixture
def boards():
    """Of three workers."""
    memory, store = mmap.mmap(-1, 64), dist.HashStore()
    boards = [StopBoard(store, rank, 3, memory) for rank in range(3)]
    for board in boards:
        board.begin(7)
    return boards


def test_nobody_stops_unasked(boards):
    assert [board.enter(index) for index in range(3) for board in boards] == [None] * 9


@pytest.mark.parametrize(("positions", "last"), [((3, 3, 3), 4), ((3, 5, 3), 6), ((3, 2, -1), 4), ((0, -1, -1), 1)])
def test_the_last_batch_is_the_first_that_none_has_begun(boards, positions, last):
    """-1: that worker has not begun the chunk."""
    for board, position in zip(boards, positions, strict=True):
        for index in range(position + 1):
            board.enter(index)
    boards[0].ask()
    for board, position in zip(boards, positions, strict=True):
        assert [board.enter(index) for index in range(position + 1, last + 1)] == [last] * (last - position)


def test_the_first_one_who_asks_is_heard(boards):
    for index in range(2):
        for board in boards:
            board.enter(index)
    boards[1].ask()
    boards[0].enter(2)
    boards[0].ask()
    assert [board.enter(2) for board in boards] == [2] * 3


def test_the_next_chunk_knows_nothing_of_it(boards):
    boards[2].enter(0)
    boards[2].ask()
    for board in boards:
        board.begin(8)
    assert [board.enter(0) for board in boards] == [None] * 3
    boards[1].ask()
    assert [board.enter(1) for board in boards] == [1] * 3


def test_a_worker_waits_for_who_names_the_batch(boards, monkeypatch):
    """It sees that one has asked, before that one has read how far the others are."""
    boards[0].enter(0)
    entered, found = threading.Event(), []

    def enter():
        entered.wait()
        found.append(boards[1].enter(4))

    waiting = threading.Thread(target=enter)
    waiting.start()

    def visible(seconds):
        entered.set()
        while not boards[0]._board[stop_board._POSITIONS + 1]:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(stop_board.time, "sleep", visible)
        boards[0].ask()
    waiting.join()
    assert found == [5] and boards[2].enter(0) == 5


def test_who_never_names_it_is_an_error(boards, monkeypatch):
    monkeypatch.setattr(stop_board, "_PATIENCE", 0.0)
    boards[0]._board[stop_board._ASKED] = 7
    with pytest.raises(RaytrainerError, match="asked to stop"):
        boards[1].enter(0)
