from __future__ import annotations

import pytest
from fakes import FakeReserver, cards

from raytrainer import ConfigurationError, ResourceError
from raytrainer.driver.cluster.gpu_claims import claim
from raytrainer.driver.cluster.placement_rules import (
    ClusterNode,
    Request,
    fits,
    gpus_of_every_node,
    refuse_impossible,
    share_out,
)


class Clock:
    """Time that passes by sleeping; `then` happens at each sleep."""

    def __init__(self, then=lambda: None) -> None:
        self.now, self.then = 0.0, then

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()


def take(request: Request, reserver: FakeReserver, timeout: float = 5.0, clock: Clock | None = None):
    clock = clock or Clock()
    return [slot.group for slot in claim(request, reserver, timeout, clock.sleep, clock)]


def test_keeps_the_chosen_and_gives_the_others_back():
    reserver = FakeReserver(4)
    assert take(Request(1, 2, True, indices=(1, 3)), reserver) == [("n0", 1), ("n0", 3)]
    assert reserver.reserved == [("n0", 1), ("n0", 3)]


def test_same_indices_on_every_node():
    reserver = FakeReserver(2, 0, 4)
    assert take(Request(2, 1, True, indices=(1,)), reserver) == [("n0", 1), ("n2", 1)]


def test_a_node_where_they_are_taken_is_passed_over():
    reserver = FakeReserver(2, 2, busy={"n0": {1}})
    assert take(Request(1, 1, True, indices=(1,)), reserver) == [("n1", 1)]
    assert len(reserver.reserved) == 1


def test_waits_holding_nothing_until_they_are_free():
    reserver = FakeReserver(4, busy={"n0": {1}})
    held = []

    def then():
        held.append(list(reserver.reserved))
        if len(held) == 3:
            reserver.busy.clear()

    assert take(Request(1, 2, True, indices=(0, 1)), reserver, 60, Clock(then)) == [("n0", 0), ("n0", 1)]
    assert held == [[], [], []]


def test_says_what_was_free_when_time_is_up():
    reserver = FakeReserver(4, busy={"n0": {1, 2}})
    with pytest.raises(ResourceError, match=r"GPUs 0-1 in PCI order.*within 5 s.*10.0.0.0: GPUs 0, 3 not held.*of 4"):
        take(Request(1, 2, True, indices=(0, 1)), reserver)
    assert reserver.reserved == []


def test_absent_indices_are_refused_at_once():
    clock = Clock()
    with pytest.raises(ConfigurationError, match=r"gpus=\[0, 9\]: this node has GPUs 0-3 \(PCI order\)"):
        take(Request(1, 2, True, indices=(0, 9)), FakeReserver(4), clock=clock)
    assert clock.now == 0
    with pytest.raises(ConfigurationError, match=r"gpus=\[3\]: node 10.0.0.0 has GPUs 0-1"):
        take(Request(2, 1, True, indices=(3,)), FakeReserver(2, 2, 4), clock=clock)
    with pytest.raises(ResourceError, match="not to be had within"):  # a node that has them may yet join
        take(Request(1, 1, True, indices=(9,)), FakeReserver(4, grows=True), clock=clock)


def test_what_ray_may_not_use_is_absent():
    reserver = FakeReserver(2)  # of four that NVML sees
    reserver.loads["n0"] = cards(*[(0, 0)] * 4)
    with pytest.raises(ConfigurationError, match=r"gpus=\[3\]: this node has GPUs 0-1"):
        take(Request(1, 1, True, indices=(3,)), reserver)
    assert reserver.reserved == []


def test_free_ones_least_loaded_first_among_those_that_ray_has():
    reserver = FakeReserver(4, busy={"n0": {3}})
    reserver.loads["n0"] = cards((200, 0), (0, 2), (5, 0), (0, 0))
    assert take(Request(1, 1, True, free=True), reserver) == [("n0", 2)]
    assert take(Request(1, 1, True, free=True), reserver) == [("n0", 0)]
    reserver.reserved.clear()
    assert take(Request(1, 2, True, free=True), reserver) == [("n0", 0), ("n0", 2)]


def test_too_few_free_ones():
    reserver = FakeReserver(2)
    reserver.loads["n0"] = cards((0, 0), (20412, 3))
    with pytest.raises(ResourceError, match=r"GPU that is free.*GPU 0 free; GPU 1: 3 process\(es\), 20412"):
        take(Request(1, 2, True, free=True), reserver)
    assert reserver.reserved == []


def test_cpus_are_reserved_where_they_suffice_for_all():
    reserver = FakeReserver(4)
    take(Request(1, 1, True, cpus=4, indices=(0,)), reserver)
    assert set(reserver.asked_cpus) == {4}
    reserver = FakeReserver(4)
    take(Request(1, 1, True, cpus=5, indices=(0,)), reserver)
    assert set(reserver.asked_cpus) == {0}


def test_impossible_requests_are_refused_where_nothing_can_join():
    with pytest.raises(ResourceError, match=r"5 worker\(s\) on each of 1 node.*GPU 4.*10.0.0.0: 16 CPU, 4 GPU"):
        refuse_impossible(Request(1, 5, True), FakeReserver(4))
    refuse_impossible(Request(1, 5, True), FakeReserver(4, grows=True))
    refuse_impossible(Request(2, 2, True), FakeReserver(4, 2))
    refuse_impossible(Request(2, 8), FakeReserver(4, 0))
    with pytest.raises(ResourceError, match=r"Ask for fewer workers or nodes, or call ray\.shutdown\(\) before fit: "):
        refuse_impossible(Request(1, 1000), FakeReserver(4), started_here=True)
    with pytest.raises(ResourceError):
        refuse_impossible(Request(2, 2, True), FakeReserver(4, 1))


def test_every_gpu_of_every_node():
    nodes = [ClusterNode(str(i), f"10.0.0.{i}", 8, count) for i, count in enumerate([4, 0, 4])]
    assert gpus_of_every_node(nodes, 2) == 4
    with pytest.raises(ResourceError, match=r"on 3 node\(s\): 2 of the cluster's 3"):
        gpus_of_every_node(nodes, 3)
    with pytest.raises(ConfigurationError, match=r"10.0.0.0 has 4, 10.0.0.2 has 4, 10.0.0.9 has 8"):
        gpus_of_every_node([*nodes, ClusterNode("9", "10.0.0.9", 8, 8)], 1)


@pytest.mark.parametrize(
    ("nodes", "per_node", "free", "held", "expected"),
    [
        (2, 1, {"a": 1.0}, {"a": 1}, False),  # one node is not two, however much is free on it
        (2, 1, {"a": 5.0, "b": 0.0}, {"a": 1}, False),
        (2, 1, {"a": 0.0, "b": 1.0}, {"a": 1}, True),
        (2, 2, {"a": 1.0, "b": 2.0}, {"a": 1}, True),
        (2, 2, {"a": 1.0, "b": 1.0}, {"a": 1}, False),
        (1, 4, {"a": 2.0}, {"a": 2}, True),
    ],
)
def test_whether_more_would_fit(nodes, per_node, free, held, expected):
    assert fits(nodes, per_node, free, held) is expected


@pytest.mark.parametrize(
    ("request_", "bundles", "places"),
    [
        (Request(1, 2), [("a", 0, 0), ("a", 2, 0)], [1, 1]),
        (Request(1, 2), [("a", 1, 0), ("a", 1, 0), ("a", 1, 0)], [0, 1]),
        (Request(1, 2), [("a", 1, 0), ("b", 1, 0)], None),
        (Request(2, 1), [("a", 1, 0), ("b", 1, 0)], [0, 1]),
        (Request(2, 2), [("a", 2, 0), ("b", 1, 0), ("c", 1, 0), ("b", 1, 0)], [0, 0, 1, 3]),
        (Request(1, 1, gpu=True), [("a", 4, 0), ("a", 1, 1)], [1]),
        (Request(1, 2, gpu=True), [("a", 4, 1)], None),
        (Request(1, 1), [("a", 0.5, 0)], None),
    ],
)
def test_room_in_a_reservation_that_is_there(request_, bundles, places):
    assert share_out(request_, bundles) == places
