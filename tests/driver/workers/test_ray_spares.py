"""Spare workers that end while they wait: others come, and who needs one in that moment does without. No Ray runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from raytrainer.driver.cluster.placement_rules import Request
from raytrainer.driver.workers import ray_crew, ray_spares
from raytrainer.driver.workers.ray_crew import Crew
from raytrainer.driver.workers.ray_spares import LOOK_EVERY, Spares
from raytrainer.worker.actor.surroundings import Surroundings


class Actor:
    """Answers as long as it lives."""

    def __init__(self) -> None:
        self.lives = True
        self.prepare = self.__ray_ready__ = SimpleNamespace(remote=lambda *args: self)
        self.imported = SimpleNamespace(remote=list)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """Those that were started."""
    started: list[Actor] = []

    def start(*args: Any) -> Any:
        return SimpleNamespace(
            options=lambda **given: SimpleNamespace(remote=lambda: started.append(Actor()) or started[-1])
        )

    def get(actor: Actor) -> str:
        if not actor.lives:
            raise RayActorError
        return "nothing"

    monkeypatch.setattr(ray_spares, "actor_class", start)
    monkeypatch.setattr(ray_spares, "options_in", lambda *args: {})
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    return started


def keep(spares: Spares) -> None:
    spares.keep(1, {"node": None}, Actor(), Surroundings([], "", "", "", {}))  # type: ignore[dict-item]


def test_another_one_comes_for_one_that_has_ended_while_it_waited(actors, monkeypatch):
    now = 0.0
    monkeypatch.setattr(ray_spares.time, "monotonic", lambda: now)
    spares = Spares(False)
    for _ in range(4):
        keep(spares)
        assert len(actors) == 1
        now += LOOK_EVERY
    actors[0].lives = False
    for _ in range(2):
        now += LOOK_EVERY
        keep(spares)
    assert len(actors) == 2
    assert spares.take("node") is actors[1]


def test_one_that_has_ended_in_the_moment_it_is_needed_is_done_without(monkeypatch):
    said: list[str] = []

    def hand_over(spare: str, *args: Any) -> str:
        said.append(spare)
        if spare != "lives":
            raise RayActorError
        return "claim"

    monkeypatch.setattr(ray_crew, "await_room", lambda *args: None)
    monkeypatch.setattr(ray_crew, "hand_over", hand_over)
    monkeypatch.setattr(ray_crew, "start_actors", lambda slots, *args: ["new"])
    place: Any = SimpleNamespace(node_id="node")
    for waiting, replaced in ((["gone", "lives"], ("lives", "claim")), (["gone", "gone"], ("new", None))):
        crew = Crew(Request(1, 1, False), [None], False)  # type: ignore[list-item]
        monkeypatch.setattr(crew.spares, "take", lambda node, left=waiting: left.pop(0) if left else None)
        assert crew._replaced(0, place) == replaced
    assert said == ["gone", "lives", "gone", "gone"]
