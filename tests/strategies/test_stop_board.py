"""`StopBoard`: the last batch is one that every worker can still end with."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading

import pytest
import torch.distributed as dist

from raytrainer.plan.culprit import Failed, is_consequence
from raytrainer.strategies import stop_board
from raytrainer.strategies.stop_board import AskerLost, StopBoard


@pytest.fixture
def boards():
    """Of three workers."""
    memory, store = mmap.mmap(-1, 128), dist.HashStore()
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
    with pytest.raises(AskerLost, match="asked to stop"):
        boards[1].enter(0)


@pytest.mark.parametrize("named", [False, True])
def test_nobody_waits_for_one_that_has_died(boards, monkeypatch, named):
    """In the millisecond before it was to name the batch, or right after it has."""
    boards[2].enter(0)
    child = os.fork()
    if not child:
        if not named:
            stop_board.time.sleep = lambda seconds: os._exit(0)
        boards[0].ask()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    monkeypatch.setattr(stop_board, "_PATIENCE", float("inf"))
    if named:
        assert boards[1].enter(0) == 1
        return
    with pytest.raises(AskerLost, match="asked to stop") as caught:
        boards[1].enter(0)
    assert is_consequence(Failed(1, "raised", type(caught.value).__name__, str(caught.value)))


def test_nothing_is_left_where_another_worker_is_lost_meanwhile(monkeypatch, tmp_path):
    def lost(*args, **kwargs):
        raise RuntimeError("connection closed by peer")

    made = []

    def mkstemp(prefix, dir):
        made.append(original(prefix=prefix, dir=tmp_path))
        return made[-1]

    original = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    monkeypatch.setattr(dist, "all_reduce", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        StopBoard.of_host(dist.HashStore(), 0, 2, None)
    ((file, _),) = made
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file)


@pytest.mark.parametrize("failure", [None, "mkstemp", "write"])
def test_without_room_for_it_there_is_none(failure, monkeypatch, tmp_path):
    """A full /dev/shm, say: workers vote instead. What was made of it is gone."""
    made = []

    def mkstemp(prefix, dir):
        if failure == "mkstemp":
            raise OSError("no room")
        file, name = original(prefix=prefix, dir=tmp_path)
        made.append(file)
        return file, name

    def write(file, data):
        return 0 if failure == "write" else real(file, data)

    real, original = os.write, tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    monkeypatch.setattr(os, "write", write)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        board = StopBoard.of_host(store, 0, 1, None)
    finally:
        dist.destroy_process_group()
        monkeypatch.undo()
    assert (board is None) == bool(failure)
    assert not list(tmp_path.iterdir())
    for file in made:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(file)
    if board is not None:
        board.begin(1)
        assert board.enter(0) is None


def test_who_has_gone_on_to_the_step_is_seen(boards):
    """By one that is in the batch, also where others are further; not those that only read it, nor those of before."""
    for index in range(3):
        for board in boards:
            board.enter(index)
            if index < 2:
                board.go_on()
    assert [board.gone_on() for board in boards] == [[], [], []]
    boards[1].go_on()
    assert boards[0].gone_on() == [1]
    boards[1].enter(3)
    boards[2].go_on()
    assert boards[0].gone_on() == [1, 2]
    for board in boards:
        board.begin(8)
        board.enter(0)
    assert boards[0].gone_on() == []
