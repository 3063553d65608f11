"""How often a run keeps its state in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from tiny import Clock

from raytrainer.driver.saving import snapshots
from raytrainer.driver.saving.checkpoint_writer import Captured
from raytrainer.driver.workers.worker_group import Copies
from raytrainer.plan.settings import build_settings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(100.0)
    monkeypatch.setattr(snapshots, "time", clock)
    return clock


def state(name: str, gone: bool = False, complete: bool = True) -> Captured:
    def fetch() -> Any:
        if gone:
            raise OSError(name)
        return [{"state_dict": name}], None

    return Captured(Copies(fetch, lambda: complete), {})


def moments(kept: snapshots.Snapshots, clock: Clock, costs: list[float]) -> list[float]:
    """Seconds after which each snapshot is due, where they cost so much."""
    found, begun = [], clock.now
    for cost in costs:
        while not kept.due(0):
            clock.now += 1.0
        found.append(clock.now - begun)
        kept.take(state("x"), 0, cost)
    return found


def test_the_first_copy_of_new_workers_does_not_count(clock: Clock) -> None:
    kept = snapshots.Snapshots(build_settings(), enabled=True)
    kept.restart(0)
    assert moments(kept, clock, [2.0, 0.04, 0.4, 0.04]) == [10.0, 20.0, 30.0, 130.0]
    kept.restart(0)
    assert moments(kept, clock, [2.0, 0.4, 0.4]) == [10.0, 20.0, 120.0]
    kept.restart(0)
    assert moments(kept, clock, [0.001] * 4) == [10.0, 20.0, 22.0, 24.0]


@pytest.mark.parametrize(("every", "moment"), [("auto", 110.0), ("00:00:00:20", 100.0), (3, 100.0)])
def test_the_time_of_the_first_chunk_does_not_count(clock: Clock, every: Any, moment: float) -> None:
    kept = snapshots.Snapshots(build_settings(snapshot_every=every), enabled=True)
    kept.restart(5)
    begun = clock.now
    clock.now += 100.0  # compiling
    kept.trained()
    while not kept.due(8):
        clock.now += 1.0
        kept.trained()
    assert clock.now - begun == moment


def test_the_newest_state_that_can_be_had(clock: Clock) -> None:
    kept = snapshots.Snapshots(build_settings(), enabled=True)
    assert kept.latest() is None
    for captured in (state("a"), state("b"), state("c", gone=True)):
        kept.take(captured, 0, 0.0)
    found = kept.latest()
    assert found is not None and found["state_dict"] == "b"


@pytest.mark.parametrize("complete", [True, False])
def test_the_one_before_goes_when_the_newest_is_safe(complete: bool, clock: Clock) -> None:
    kept = snapshots.Snapshots(build_settings(), enabled=True)
    kept.let_go()
    older = state("a")
    for captured in (older, state("b", complete=complete)):
        kept.take(captured, 0, 0.0)
    gone = weakref.ref(older)
    del older, captured
    kept.let_go()
    assert (gone() is None) is complete
    found = kept.latest()
    assert found is not None and found["state_dict"] == "b"


def test_nothing_is_kept_where_nothing_is_recovered(clock: Clock) -> None:
    kept = snapshots.Snapshots(build_settings(max_failures=0), enabled=True)
    kept.take(state("a"), 0, 0.0)
    clock.now += 1e6
    assert kept.latest() is None and not kept.due(10**6)


@pytest.mark.parametrize(
    ("every", "seconds", "steps", "expected"),
    [("auto", 4.0, 1000, False), ("auto", 5.0, 1, True), ("auto", 5.0, 0, False), (9, 0.0, 4, False),
     (9, 0.0, 5, True), (None, 1e6, 9, False), ("00:00:00:02", 1.0, 1, True)],
)  # fmt: skip
def test_the_first_is_announced_halfway(clock: Clock, every: Any, seconds: float, steps: int, expected: bool) -> None:
    kept = snapshots.Snapshots(build_settings(snapshot_every=every), enabled=True)
    kept.restart(3)
    clock.now += seconds
    assert kept.approaching(3 + steps) is expected
    assert not expected or not kept.approaching(3 + steps)  # once


@pytest.mark.parametrize("enabled", [True, False])
def test_where_callbacks_save_the_first_step_announces(enabled: bool) -> None:
    kept = snapshots.Snapshots(build_settings(snapshot_every=None), enabled=enabled)
    kept.saves = True
    kept.restart(3)
    assert [kept.approaching(step) for step in (3, 4, 5)] == [False, True, False]


def test_later_ones_are_not_announced(clock: Clock) -> None:
    kept = snapshots.Snapshots(build_settings(snapshot_every=2), enabled=True)
    kept.restart(0)
    kept.take(state("x"), 0, 0.1)
    assert not kept.approaching(1)
