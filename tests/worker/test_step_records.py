"""What a worker writes down after each step, and what is left of it."""

from __future__ import annotations

import mmap
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrainer.messages import TrainReport
from raytrainer.metric_messages import MetricReport
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.plan.common_moment import KEPT_BEHIND
from raytrainer.tensor_packing import unpack
from raytrainer.worker import step_records
from raytrainer.worker.record_memory import _HEAD, RecordMemory
from raytrainer.worker.step_copies import OnTheWay, StepCopies
from raytrainer.worker.step_records import RecordedMoments, StepRecords

ROOM = 64


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, RecordMemory.length(2, 2, ROOM))


def test_the_last_two_are_kept(memory):
    ours, theirs = RecordMemory(memory, 2, 2, ROOM), RecordMemory(memory, 2, 2, ROOM)
    assert ours.read(0) == {}
    for turn in range(1, 5):
        assert ours.write(0, turn, (7, turn), bytes([turn]) * turn)
        assert ours.write(1, turn, (7, turn + 1), b"other")
    assert theirs.read(0) == {(7, 3): b"\x03" * 3, (7, 4): b"\x04" * 4}
    assert theirs.read(1) == {(7, 4): b"other", (7, 5): b"other"}


def test_what_has_no_room_leaves_what_there_is(memory):
    records = RecordMemory(memory, 2, 2, ROOM)
    assert records.write(0, 1, (1, 1), b"a" * ROOM)
    assert not records.write(0, 3, (1, 3), b"b" * (ROOM + 1))
    assert records.read(0) == {(1, 1): b"a" * ROOM}


@pytest.mark.parametrize("written", range(1, _HEAD.size + ROOM))
def test_half_a_record_is_none(written, memory):
    """A worker killed after so many bytes: first the record's, then the head's."""
    records = RecordMemory(memory, 2, 2, ROOM)
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
    copies, live = StepCopies(2), {"w": torch.nn.Parameter(torch.ones(3)), "m": torch.zeros(2, dtype=torch.float64)}
    assert copies.begin(1, live) and copies.moments() == []
    copies.complete(1, (1, 1))
    with torch.no_grad():
        live["w"].mul_(2)
    kept = copies.of((1, 1))["w"]
    assert kept.tolist() == [1, 1, 1] and not kept.requires_grad
    for turn in (2, 3):
        assert copies.begin(turn, live)
        copies.complete(turn, (1, turn))
    assert copies.of((1, 3))["w"].data_ptr() == kept.data_ptr() and kept.tolist() == [2, 2, 2]
    assert sorted(copies.moments()) == [(1, 2), (1, 3)]
    more: dict[str, Any] = {**live, "v": torch.ones(1)}
    assert copies.begin(4, more) and copies.moments() == [(1, 3)]
    copies.complete(4, (1, 4))
    assert list(copies.of((1, 4))) == ["w", "m", "v"] and list(copies.of((1, 3))) == ["w", "m"]
    copies.drop()
    assert copies.moments() == []


def test_copies_that_fail_are_of_no_moment(monkeypatch):
    copies, live = StepCopies(2), {"w": torch.ones(3)}
    for turn in (1, 2):
        assert copies.begin(turn, live)
        copies.complete(turn, (1, turn))

    def fails(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("raytrainer.worker.step_copies.copy_together", fails)
    with pytest.raises(MemoryError):
        copies.begin(3, live)
    assert copies.moments() == [(1, 2)]


def test_copies_have_the_room_that_they_have():
    live = {"w": torch.ones(100, device="meta"), "step": torch.ones(100)}  # what is on CPUs does not count
    assert not StepCopies(4, room=1599).begin(1, live)
    assert StepCopies(4, room=1600).begin(1, live)


def test_tensors_travel_together_as_they_are():
    live = [torch.arange(6).view(2, 3), torch.ones(()), torch.tensor([True]), torch.ones(4)[::2], torch.arange(4)]
    before, travelling = [tensor.clone() for tensor in live], OnTheWay()
    assert [travelling.add(tensor).index for tensor in live] == [0, 1, 2, 3, 4]
    travelling.begin()
    for tensor in live:
        tensor.zero_()
    assert all(torch.equal(one, other) for one, other in zip(travelling.arrived(), before, strict=True))
    assert OnTheWay().arrived() == []


@pytest.fixture
def begun(monkeypatch):
    """Takes a moment of a device that is behind; what that does when it has come to it is given. All are told."""
    monkeypatch.setattr(
        step_records, "_content", lambda run, live, travelling: ("own", travelling.add(run.module.weight))
    )
    metrics = MetricStore(0, 1)
    run = SimpleNamespace(
        view=SimpleNamespace(metrics=metrics, optimizers=[]),
        module=torch.nn.Linear(1, 1, bias=False),
        strategy=SimpleNamespace(device=torch.device("cpu")),
    )
    memory = mmap.mmap(-1, RecordMemory.length(1, KEPT_BEHIND, 2**12))
    records = StepRecords(RecordMemory(memory, 1, KEPT_BEHIND, 2**12), 0, True, StepCopies(KEPT_BEHIND))
    waits: list[Any] = []
    monkeypatch.setattr(step_records, "_nothing", lambda: waits.pop(0)())

    def take(batches: int, when_it_has_come: Any = lambda: None) -> RecordedMoments:
        with torch.no_grad():
            run.module.weight.fill_(batches)
        records.take(run, TrainReport(batches, batches, batches, 0.0, False, False, 0.0, MetricReport()))
        waits.append(when_it_has_come)
        return records.moments()

    take.records, take.metrics = records, metrics  # type: ignore[attr-defined]
    return take


def test_a_moment_counts_once_the_device_has_come_to_it(begun):
    assert begun(1).written == [[]]
    for batches in range(2, 9):
        told = begun(batches)
        assert sorted(told.copied) == [(0, number) for number in range(max(1, batches - 3), batches)]
        assert told.written == [[(0, number) for number in range(max(1, batches - 4), batches)]]
        for moment in told.copied:
            (record,), copies = begun.records.state(moment)
            assert copies["weight"].item() == moment[1]
            assert unpack(pickle.loads(record)[1])[0].item() == moment[1]
    begun.records.finish(begun.metrics)
    assert begun.records.moments().written[0][-1] == (0, 8)


def test_what_a_device_does_when_collectives_have_ended_does_not_count(begun):
    begun(1)
    begun(2)
    assert begun(3, begun.records.close).written == [[(0, 1), (0, 2)]]
    for batches in range(4, 20):  # what the worker goes on to, until it hears of the end
        told = begun(batches)
        assert told.written == [[(0, 1), (0, 2)]] and sorted(told.copied) == [(0, 1), (0, 2)]
    assert begun.records.state((0, 2))[1]["weight"].item() == 2


def test_when_one_stops_all_do(begun):
    begun(1)
    begun(2)
    begun.records._memory.stop()
    assert begun.records.whole
    assert begun(3).copied == [] and not begun.records.whole
    assert begun(4).written == [[(0, 1), (0, 2)]]
