"""Workers begin to start as soon as Ray is asked for their places, and end where these are not to be had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from raytrainer import ResourceError
from raytrainer.driver.cluster import reservation
from raytrainer.driver.cluster.placement_rules import ClusterNode, Request
from raytrainer.driver.workers import ray_crew
from raytrainer.driver.workers.ray_group import RayGroup


def test_workers_are_asked_for_with_their_places_and_end_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def wait(group: Any, seconds: float) -> bool:
        said.append("waits")
        return False

    def start(slots: Any, *_: Any) -> list[str]:
        said.append(f"starts {len(slots)}")
        return [f"worker {i}" for i, _ in enumerate(slots)]

    monkeypatch.setattr(reservation, "placement_group", lambda *_, **__: SimpleNamespace(id="places"))
    monkeypatch.setattr(reservation, "remove_placement_group", lambda group: said.append(f"removes {group.id}"))
    monkeypatch.setattr(reservation, "own_reservation", lambda: None)
    monkeypatch.setattr(reservation, "resources_text", lambda: "nothing")
    monkeypatch.setattr(reservation.RayReserver, "nodes", lambda self: [ClusterNode("id", "10.0.0.1", 4.0, 0)])
    monkeypatch.setattr(reservation, "_wait", wait)
    monkeypatch.setattr(ray_crew, "start_actors", start)
    monkeypatch.setattr(ray, "put", lambda value: None)
    monkeypatch.setattr(ray, "kill", lambda actor: said.append(f"kills {actor}"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:1"))
    with pytest.raises(ResourceError, match="not to be had"):
        RayGroup(Request(1, 2, False), 0.0)
    assert said == ["starts 2", "waits", "waits", "removes places", "kills worker 0", "kills worker 1"]
