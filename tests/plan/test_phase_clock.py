from __future__ import annotations

import pytest

from raytrainer.plan import phase_clock as timing
from raytrainer.plan.phase_clock import PhaseClock, TimeReport


@pytest.fixture
def tick(monkeypatch):
    """Advances time."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_phase_inside_another_interrupts_it(tick):
    clock = PhaseClock()
    tick(1)
    clock.switch("other")
    with clock.phase("training"):
        tick(10)
    clock.chunk(8.0, 5.0)
    with clock.phase("validating"):
        tick(2)
        with pytest.raises(LookupError), clock.phase("saving"):
            tick(4)
            raise LookupError
        tick(2)
    tick(0.5)
    report = clock.report()
    assert report == TimeReport(
        total=19.5, starting=1, data=5, computing=3, synchronising=2, validating=4, saving=4, other=0.5
    )
    assert sum(report.shares.values()) == pytest.approx(1.0)


def test_recovering_counts_as_starting(tick):
    clock = PhaseClock()
    clock.switch("other")
    tick(1)
    clock.switch("starting")
    tick(3)
    assert clock.report().starting == 3 and clock.report().other == 1


def test_workers_cannot_have_been_busier_than_the_driver_waited(tick):
    clock = PhaseClock()
    with clock.phase("training"):
        tick(1)
    clock.chunk(1.1, 1.2)
    report = clock.report()
    assert (report.data, report.computing, report.synchronising) == (1.0, 0.0, 0.0)


def test_what_it_says():
    report = TimeReport(total=100.0, data=62.0, computing=30.0, saving=7.9, other=0.1)
    assert str(report) == "100.0 s: 62 % waiting for data, 30 % computing, 8 % saving"
    assert report.hint == "62 % of the time the workers waited for data: raise num_workers."
    of_ray = TimeReport(total=100.0, data=62.0, computing=30.0, other=8.0, ray_data=True)
    assert "prefetch_batches" in of_ray.hint and "num_workers" not in of_ray.hint
    assert sum(of_ray.shares.values()) == pytest.approx(1.0)
    assert TimeReport(total=100.0, data=40.0, computing=60.0).hint is None
    assert TimeReport(total=100.0, data=20.0, computing=1.0, starting=79.0).hint is None
    assert TimeReport(total=1.0, data=0.9, computing=0.1).hint is None
    assert TimeReport().shares["data"] == 0.0
