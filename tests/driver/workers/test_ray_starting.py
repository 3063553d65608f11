"""Workers whose node goes while they start: Ray would keep them waiting for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tiny import Clock

from raytrainer.driver.cluster.placement_rules import Slot
from raytrainer.driver.workers import ray_starting
from raytrainer.driver.workers.ray_starting import LOOK_EVERY, MOVING, PlacesWatch
from raytrainer.errors import WorkerLostError


@pytest.mark.parametrize("moved", [False, True])
def test_a_node_that_goes(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may have room, where Ray moves the reservation to."""
    clock, bundles = Clock(0.0), {0: "a", 1: "b"}
    nodes = {"a": True, "b": True, "c": True}
    monkeypatch.setattr(ray_starting, "nodes_alive", lambda: {name for name, alive in nodes.items() if alive})
    tables = SimpleNamespace(placement_group_table=lambda group: {"bundles_to_node_id": bundles})
    monkeypatch.setattr(ray_starting, "ray", SimpleNamespace(util=tables))
    monkeypatch.setattr(ray_starting, "time", clock)
    group: Any = SimpleNamespace(id="g")
    watch = PlacesWatch([Slot(group, bundle, 1.0) for bundle in (0, 0, 1, 1)])

    def look_for(seconds: float) -> None:
        until = clock.now + seconds
        while clock.now < until:
            clock.now += 0.25
            watch.look(())

    look_for(10 * MOVING)
    nodes["b"] = False
    look_for(MOVING / 2)
    bundles[1] = "c" if moved else ""
    if moved:
        look_for(10 * MOVING)
    else:
        with pytest.raises(WorkerLostError, match="rank 2 is gone: its node"):
            look_for(MOVING + 2 * LOOK_EVERY)
