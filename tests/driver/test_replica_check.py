from __future__ import annotations

import logging
from typing import Any

import pytest
from tiny import Clock

from raytrainer.driver.loop import replica_check
from raytrainer.driver.loop.replica_check import ReplicaCheck
from raytrainer.errors import DisagreementError
from raytrainer.messages import Difference, Fingerprints


class Group:
    """Workers that hold what they are given, and take their time."""

    def __init__(self, clock: Clock, *held: dict[str, int], size: int | None = None) -> None:
        self.clock, self.held, self.size = clock, list(held), len(held) if size is None else size
        self.buffers: list[dict[str, int]] = [{} for _ in held]
        self.asked: list[str] = []
        self.apart = Difference(0.5, 2.0, 1e-5)

    def call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(method.__name__)
        self.clock.now += 0.01
        if method.__name__ == "compare":
            same = Difference(0.0, 2.0, 1e-5)
            first, names = self.held[0] | self.buffers[0], args[0]
            own = [held | buffers for held, buffers in zip(self.held, self.buffers, strict=True)]
            return [[self.apart if held[name] != first[name] else same for name in names] for held in own]
        weights = kwargs.get("parameters", True)
        return [Fingerprints(dict(h) if weights else {}, dict(b)) for h, b in zip(self.held, self.buffers, strict=True)]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(100.0)
    monkeypatch.setattr(replica_check, "time", clock)
    return clock


def test_equal_workers_are_left_alone(clock):
    group, check = Group(clock, {"a": 1, "b": 2}, {"a": 1, "b": 2}), ReplicaCheck(True)
    check.begin(group)
    check.after_epoch(group, 0)
    assert group.asked == ["fingerprints", "fingerprints"]


def test_the_first_tensor_that_differs_is_named(clock):
    group = Group(clock, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "c": 4})
    with pytest.raises(DisagreementError) as told:
        ReplicaCheck(True).after_epoch(group, 4)
    for words in (
        "after epoch 4 rank(s) [2] have another b",
        "0.5",
        "is 2, and 1 more tensor.",
        "check_replicas=False",
    ):
        assert words in str(told.value)


def test_short_epochs_share_a_check(clock):
    group, check = Group(clock, {"a": 1}, {"a": 1}), ReplicaCheck(True)
    check.begin(group)
    for epoch in range(30):
        check.after_epoch(group, epoch)
        clock.now += 1.0
    # one takes 0.01 s, so there is one every 10 s
    assert len(group.asked) == 1 + 3
    check.check(group, 29)
    assert len(group.asked) == 5  # what the last epochs have left
    check.check(group, 29)
    assert len(group.asked) == 5


@pytest.mark.parametrize(("wanted", "size"), [(False, 2), (True, 1)])
def test_where_there_is_nothing_to_compare(wanted, size, clock):
    group, check = Group(clock, {"a": 1}, {"a": 2}, size=size), ReplicaCheck(wanted)
    check.begin(group)
    check.after_epoch(group, 0)
    check.check(group, 0)
    assert group.asked == []


def test_rounding_is_no_error_and_is_told_once(clock, caplog):
    group, check = Group(clock, {"a": 1}, {"a": 2}), ReplicaCheck(True)
    group.apart = Difference(1e-6, 2.0, 1e-5)
    with caplog.at_level(logging.WARNING, "raytrainer"):
        for epoch in range(3):
            check.after_epoch(group, epoch)
            clock.now += 100.0
    assert [record.getMessage() for record in caplog.records if "rounding" in record.getMessage()][1:] == []
    assert "After epoch 0" in caplog.text


@pytest.mark.parametrize("apart", [Difference(float("nan"), 2.0, 1e-5), Difference(1.0, float("nan"), 1e-5)])
def test_what_is_no_number_is_no_rounding(apart, clock):
    group = Group(clock, {"a": 1}, {"a": 2})
    group.apart = apart
    with pytest.raises(DisagreementError):
        ReplicaCheck(True).after_epoch(group, 0)


@pytest.mark.parametrize(
    ("first", "other", "refused"),
    [
        ((7, 8), (7, 9), False),  # running statistics: each worker has its own
        ((7, 7), (7, 9), True),  # rank 0 has left it alone
        ((7, 8), (7, 8), False),
        ((7, 7), (7, 7), False),
    ],
)
def test_buffers(first, other, refused, clock):
    group, check = Group(clock, {"a": 1}, {"a": 1}), ReplicaCheck(True)
    group.buffers = [{"n": first[0]}, {"n": other[0]}]
    check.begin(group)
    group.buffers = [{"n": first[1]}, {"n": other[1]}]
    if refused:
        with pytest.raises(DisagreementError, match="another n than"):
            check.after_epoch(group, 0)
    else:
        check.after_epoch(group, 0)


def test_a_buffer_that_has_come_up_since_is_each_workers_own(clock):
    group, check = Group(clock, {"a": 1}, {"a": 1}), ReplicaCheck(True)
    check.begin(group)
    group.buffers = [{"n": 7}, {"n": 9}]
    check.after_epoch(group, 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (0.1, 0.1 * (1 + 1e-7), True),  # a schedule in float32, on two machines
        (0.0, 1e-19, True),  # the end of a cosine
        (float("nan"), float("nan"), True),
        ((0.9, None), (0.9, None), True),
        (1, 1.0, True),
        (0.1, 0.101, False),
        (1e-8, 2e-8, False),  # eps
        ((0.9, 0.99), (0.9, 0.999), False),
        ((0.9, 0.99), (0.9,), False),
        (True, False, False),
        (0.1, None, False),
    ],
)
def test_settings_of_optimizers(one, other, same):
    reports = [Fingerprints({}, {}, {"lr of SGD, group 0": value}) for value in (one, one, other)]
    if same:
        replica_check._refuse_other_settings(reports, 2)
        return
    with pytest.raises(DisagreementError, match=r"after epoch 2 rank\(s\) \[2\] have another lr of SGD, group 0: "):
        replica_check._refuse_other_settings(reports, 2)


def test_buffers_that_differ_where_a_run_goes_on_are_told_only_if_they_do_so_later(clock):
    """It may go on at an epoch's end, before rank 0 has changed any of its own."""
    for goes_on in (True, False):
        group, check = Group(clock, {"a": 1}, {"a": 1}), ReplicaCheck(True)
        group.buffers = [{"mean": 3}, {"mean": 4}]
        check.begin(group, goes_on)
        if goes_on:
            check.after_epoch(group, 0)
            clock.now += 1000.0
        with pytest.raises(DisagreementError, match="another mean"):
            check.after_epoch(group, 1)
