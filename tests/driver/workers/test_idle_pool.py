"""How long idle groups are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer.driver.cluster import resources as cluster
from raytrainer.driver.cluster.placement_rules import Request
from raytrainer.driver.workers import idle_pool as pool
from raytrainer.errors import ResourceError


class Group:
    """Of a pool, an idle group is no more than this."""

    def __init__(self, request: Any, holds: tuple[str, ...] = ("CPU",), usable: bool = True) -> None:
        self.request, self.holds, self.usable = request, set(holds), usable
        self.broken = False
        self.ended: Callable[[], None] = lambda: None

    def abort(self) -> None:
        if not self.broken:
            self.broken = True
            self.ended()


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """What others wait for; the pool looks often, and is emptied afterwards."""
    pool.close_idle()
    kinds: set[str] = set()
    monkeypatch.setattr(pool, "somebody_waits", lambda held: bool(held & kinds))
    monkeypatch.setattr(pool, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(pool, "GIVE_WAY", 0.05)
    monkeypatch.setattr(pool, "_timeout", 300.0)
    yield kinds
    pool.close_idle()
    eventually(lambda: "raytrainer-idle" not in {thread.name for thread in threading.enumerate()})
    assert pool._watcher is None


def put_back(*groups: Group) -> None:
    for group in groups:
        pool.put_back(group)  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_kept_for_the_next_run_goes_with_the_last_group(
    waiting: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(pool, "_forgetters", [])

    def forget() -> None:
        told.append(1)

    pool.when_none_idle(forget)
    pool.when_none_idle(forget)
    pool.close_idle()  # there was none: what a run has just prepared stays
    first, second = Group("a"), Group("b")
    put_back(first, second)
    pool.tell_none()
    pool._release([first])
    assert told == []
    pool.close_idle()
    assert told == [1]
    monkeypatch.setattr(pool, "_timeout", 0.0)
    put_back(Group("a"))
    assert told == [1, 1]


def test_the_newest_that_is_well_is_taken(waiting: set[str]) -> None:
    old, new, ill, other = Group("a"), Group("a"), Group("a", usable=False), Group("b")
    put_back(old, new, other, ill)
    assert [pool._take_idle("a") for _ in range(3)] == [new, old, None]  # type: ignore[arg-type]
    assert pool._take_idle("b") is other  # type: ignore[arg-type]


def test_each_ends_when_its_time_is_over(waiting: set[str]) -> None:
    lasting, brief, none = Group("a"), Group("b"), Group("c")
    put_back(lasting)
    pool.set_idle_timeout(0.05)
    put_back(brief)
    pool.set_idle_timeout(0)
    put_back(none)
    assert none.broken
    eventually(lambda: brief.broken)
    pool.set_idle_timeout(float("inf"))
    put_back(for_ever := Group("d"))
    assert pool._take_idle("a") is lasting and pool._take_idle("d") is for_ever  # type: ignore[arg-type]


def test_one_that_cannot_be_ended_keeps_no_other(waiting: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Ray has ended")

    stuck, brief, later = Group("a"), Group("b"), Group("c")
    monkeypatch.setattr(stuck, "abort", fails)
    pool.set_idle_timeout(0.05)
    put_back(stuck, brief)
    eventually(lambda: brief.broken)
    put_back(later)
    eventually(lambda: later.broken)


def test_groups_give_way_to_others_that_wait(waiting: set[str], caplog: pytest.LogCaptureFixture) -> None:
    groups = Group("a", ("CPU", "GPU")), Group("b")
    with caplog.at_level("INFO", "raytrainer"):
        put_back(*groups)
        waiting.add("GPU")
        eventually(lambda: all(group.broken for group in groups))
    assert "others wait for their CPU and GPU" in caplog.text


def test_but_not_at_once_nor_for_what_they_do_not_hold(waiting: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []

    def look(held: set[str]) -> bool:
        looks.append(len(looks) % 2 == 0)  # somebody else each time: nobody waits for long
        return looks[-1]

    monkeypatch.setattr(pool, "somebody_waits", look)
    monkeypatch.setattr(pool, "GIVE_WAY", 0.0101)
    group, reserved = Group("a"), Group("b", ())
    put_back(group)
    eventually(lambda: len(looks) > 10)
    assert pool._take_idle("a") is group  # type: ignore[arg-type]
    eventually(lambda: pool._watcher is None)
    looks.clear()
    monkeypatch.setattr(pool, "LOOK_EVERY", 0.001)
    put_back(reserved)
    pool.set_idle_timeout(0.05)
    put_back(brief := Group("c", ()))
    eventually(lambda: brief.broken)
    assert not looks and not reserved.broken


def test_a_run_that_reads_its_datasets_keeps_them(waiting: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waiting.add("CPU")
    with pool.kept():
        put_back(group := Group("a"))
        pool.set_idle_timeout(0.2)
        put_back(brief := Group("c"))
        eventually(lambda: brief.broken)  # four times as long as they would wait otherwise
        assert not group.broken
        monkeypatch.setattr(pool, "GIVE_WAY_TO_OWN", 0.3)  # not for ever: it may wait for what they hold
        eventually(lambda: group.broken)
    pool.set_idle_timeout(300)
    put_back(group := Group("a"))
    eventually(lambda: group.broken)


def test_one_that_comes_while_somebody_looks_stays(waiting: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    young = Group("b")

    looks: list[set[str]] = []

    def look(held: set[str]) -> bool:
        looks.append(held)
        if len(looks) == 1:
            put_back(young)
        return len(looks) == 1

    monkeypatch.setattr(pool, "GIVE_WAY", 0.0)
    monkeypatch.setattr(pool, "somebody_waits", look)
    put_back(old := Group("a"))
    eventually(lambda: old.broken)
    eventually(lambda: len(looks) > 2)
    assert old.broken and not young.broken


class Ray:
    """Nodes with CPUs and GPUs, which groups take, and give back when they are ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: tuple[float, float]) -> None:
        self.free = {name: {str(i): node[j] for i, node in enumerate(nodes)} for j, name in enumerate(("CPU", "GPU"))}
        self.told: dict[str, dict[str, float]] | None = None  # if Ray is late
        self.timeouts: list[float] = []
        monkeypatch.setattr(pool, "own_reservation", lambda: None)
        monkeypatch.setattr(pool, "free_by_node", lambda name: dict((self.told or self.free)[name]))

    def group(self, request: Request, timeout: float) -> Any:
        self.timeouts.append(timeout)
        wanted = {"CPU": request.cpus * request.per_node, "GPU": float(request.per_node * request.gpu)}
        able = [n for n in self.free["CPU"] if all(self.free[kind][n] >= wanted[kind] for kind in wanted)]
        if len(able) < request.nodes:
            raise ResourceError("not to be had.")
        self.add(wanted, able[: request.nodes], -1)
        made = Group(request, ("CPU", "GPU"))
        made.ended = lambda: self.add(wanted, able[: request.nodes], 1)
        return made

    def add(self, amounts: dict[str, float], nodes: list[str], sign: int) -> None:
        for kind, amount in amounts.items():
            for node in nodes:
                self.free[kind][node] += sign * amount


@pytest.mark.parametrize(
    ("idle", "wanted", "stays"),
    [
        (Request(1, 2), Request(1, 1), True),
        (Request(1, 2), Request(1, 3), True),
        (Request(1, 2), Request(1, 4), False),  # no CPU would be left to read data
        (Request(1, 2), Request(1, 5), False),
        (Request(2, 2), Request(2, 1), True),
        (Request(1, 2), Request(2, 3), False),  # one node has no room for three
        (Request(1, 1, gpu=True), Request(1, 1), True),
        (Request(1, 1, gpu=True), Request(1, 2, gpu=True), True),
        (Request(1, 2, gpu=True), Request(1, 3, gpu=True), False),
        (Request(1, 2), Request(1, 1, gpu=True, indices=(0,)), False),
        (Request(1, 2), Request(1, 1, gpu=True, free=True), False),
    ],
    ids=str,
)
def test_groups_of_other_resources_stay_where_there_is_room(
    waiting: set[str], monkeypatch: pytest.MonkeyPatch, idle: Request, wanted: Request, stays: bool
) -> None:
    nodes = [(4.0, 3.0), (4.0, 0.0)] if max(idle.nodes, wanted.nodes) > 1 else [(6.0, 3.0)]
    ray = Ray(monkeypatch, *nodes)
    put_back(kept := pool.take([idle], 60.0, ray.group))
    taken = pool.take([wanted], 60.0, ray.group)
    assert taken.request == wanted
    assert kept.broken is not stays
    assert (pool._take_idle(idle) is kept) is stays


def test_they_go_where_ray_was_late_to_tell(waiting: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch, (4.0, 0.0))
    ray.told = {"CPU": {"0": 4.0}, "GPU": {"0": 0.0}}
    put_back(kept := pool.take([Request(1, 2)], 60.0, ray.group))
    taken = pool.take([Request(1, 3)], 60.0, ray.group)
    assert taken.request.per_node == 3 and kept.broken
    assert ray.timeouts == [60.0, pool.BRIEFLY, 60.0]


def test_they_go_in_a_reservation_and_where_ray_does_not_tell(
    waiting: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> Any:
        raise RuntimeError("the head is busy")

    for name, answer in (("own_reservation", lambda: "a placement group"), ("free_by_node", fails)):
        with monkeypatch.context() as patch:
            ray = Ray(patch, (9.0, 0.0))
            patch.setattr(pool, name, answer)
            put_back(kept := pool.take([Request(1, 2)], 60.0, ray.group))
            pool.take([Request(1, 1)], 60.0, ray.group)
            assert kept.broken


def state(nodes: list[dict[str, float]], tasks: list[dict[str, float]], gangs: list[list[dict[str, float]]]) -> Any:
    from ray.core.generated import autoscaler_pb2 as messages

    found = messages.ClusterResourceState()
    for node in nodes:
        added = found.node_states.add()
        added.total_resources.update(node)
        added.available_resources.update({name: free for name, free in node.items() if name == "memory"})
    for task in tasks:
        found.pending_resource_requests.add().request.resources_bundle.update(task)
    for gang in gangs:
        added = found.pending_gang_resource_requests.add()
        for bundle in gang:
            added.requests.add().resources_bundle.update(bundle)
    return found


@pytest.mark.parametrize(
    ("kinds", "tasks", "gangs", "waits"),
    [
        ({"CPU"}, [], [], False),
        ({"CPU"}, [{"CPU": 1}], [], True),
        ({"CPU"}, [{"memory": 1e9}], [], False),
        ({"CPU"}, [{"CPU": 1, "memory": 1e9}], [], True),
        ({"CPU"}, [{"CPU": 1, "GPU": 1}], [], False),  # for others' GPUs
        ({"CPU", "GPU"}, [{"CPU": 1, "GPU": 1}], [], True),
        ({"CPU"}, [{"CPU": 9}], [], False),  # no node has it
        ({"GPU"}, [{"CPU": 1}], [], False),
        ({"GPU"}, [{"CPU": 9}, {"GPU": 1}], [], True),
        ({"CPU"}, [{"CPU_group_1f": 1}], [], False),  # within a reservation
        ({"CPU"}, [], [[{"CPU": 1}, {"CPU": 4}]], True),
        ({"CPU"}, [], [[{"CPU": 1}, {"CPU": 9}]], False),
    ],
)
def test_who_waits(monkeypatch: pytest.MonkeyPatch, kinds: set[str], tasks: Any, gangs: Any, waits: bool) -> None:
    from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply

    found = state([{"CPU": 4, "memory": 2e9}, {"CPU": 2, "GPU": 2}, {}], tasks, gangs)
    answer = GetClusterResourceStateReply(cluster_resource_state=found).SerializeToString()
    client = SimpleNamespace(get_cluster_resource_state=lambda timeout_s: answer)
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=client))
    assert cluster.somebody_waits(kinds) is waits


@pytest.mark.parametrize("client", [None, SimpleNamespace(get_cluster_resource_state=lambda timeout_s: b"\xff")])
def test_where_ray_does_not_tell(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setattr("ray._private.worker.global_worker", SimpleNamespace(gcs_client=client))
    assert cluster.somebody_waits({"CPU"}) is False
