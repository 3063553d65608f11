"""What a worker writes down after each step, and what is left of it."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from raytrainer.worker.step_records import _HEAD, Records, _Copies

ROOM = 64


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, Records.length(2, ROOM))


def test_the_last_two_are_kept(memory):
    ours, theirs = Records(memory, 2, ROOM), Records(memory, 2, ROOM)
    assert ours.read(0) == {}
    for turn in range(1, 5):
        assert ours.write(0, turn, (7, turn), bytes([turn]) * turn)
        assert ours.write(1, turn, (7, turn + 1), b"other")
    assert theirs.read(0) == {(7, 3): b"\x03" * 3, (7, 4): b"\x04" * 4}
    assert theirs.read(1) == {(7, 4): b"other", (7, 5): b"other"}


def test_what_has_no_room_leaves_what_there_is(memory):
    records = Records(memory, 2, ROOM)
    assert records.write(0, 1, (1, 1), b"a" * ROOM)
    assert not records.write(0, 3, (1, 3), b"b" * (ROOM + 1))
    assert records.read(0) == {(1, 1): b"a" * ROOM}


@pytest.mark.parametrize("written", range(1, _HEAD.size + ROOM))
def test_half_a_record_is_none(written, memory):
    """A worker killed after so many bytes: first the record's, then the head's."""
    records = Records(memory, 2, ROOM)
    assert records.write(0, 1, (1, 1), b"a" * ROOM)
    assert records.write(0, 2, (1, 2), b"b" * ROOM)
    before = bytes(memory)
    assert records.write(0, 3, (1, 3), b"c" * ROOM)
    after, at = bytes(memory), records._place(0, 3)
    changed = [*range(at + _HEAD.size, at + _HEAD.size + ROOM), *range(at, at + _HEAD.size)]
    half = bytearray(before)
    for place in changed[:written]:
        half[place] = after[place]
    memory[:] = bytes(half)
    found = records.read(0)
    assert found[1, 2] == b"b" * ROOM
    assert set(found) <= {(1, 1), (1, 2), (1, 3)}
    assert all(record == {1: b"a", 2: b"b", 3: b"c"}[batch] * ROOM for (_, batch), record in found.items())
    assert ((1, 3) in found) == (bytes(half) == after)


def test_copies_are_of_their_moment():
    copies, live = _Copies(), {"w": torch.nn.Parameter(torch.ones(3)), "m": torch.zeros(2, dtype=torch.float64)}
    copies.take((1, 1), live)
    kept = copies.tensors["w"]
    with torch.no_grad():
        live["w"].mul_(2)
    assert copies.moment == (1, 1) and kept.tolist() == [1, 1, 1] and not kept.requires_grad
    copies.take((1, 2), live)
    assert copies.tensors["w"] is kept and kept.tolist() == [2, 2, 2]
    more: dict[str, Any] = {**live, "v": torch.ones(1)}
    copies.take((1, 3), more)
    assert list(copies.tensors) == ["w", "m", "v"] and copies.moment == (1, 3)


def test_copies_that_fail_are_of_no_moment(monkeypatch):
    copies, live = _Copies(), {"w": torch.ones(3)}
    copies.take((1, 1), live)

    def fails(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "copy_", fails)
    with pytest.raises(MemoryError):
        copies.take((1, 2), live)
    assert copies.moment is None
