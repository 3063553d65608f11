"""`Spares`: processes that wait to take a lost worker's place.

A spare is an actor without resources in the group's reservation. It imports what the group's workers have imported, in
a thread of low priority, and touches no GPU, so that it can become a worker on any GPU of its node.
"""

from __future__ import annotations

import inspect
import logging
import pickle
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import ray
from ray.exceptions import RayError

from raytrainer.driver.cluster.placement_rules import Slot
from raytrainer.driver.workers.ray_starting import actor_class, options_in
from raytrainer.worker.actor.actor import RemoteWorker
from raytrainer.worker.actor.staging_worker import StagingWorker
from raytrainer.worker.actor.surroundings import Surroundings

__all__ = ["Spares"]

log = logging.getLogger("raytrainer")

#: How many may end unused before no more are started: something is wrong there, or memory is scarce.
MOST_FAILURES = 3

#: Seconds between looks at whether one that waits is still there: where memory is scarce, it is the first to be ended.
LOOK_EVERY = 5.0


@dataclass
class _Spare:
    node: str
    actor: Any
    asked: Any | None  # at first answered, with a `Readiness`, once it is ready; later, if it is still there
    told: bool = False
    next: float = 0.0  # moment to ask again


class Spares:
    """Those of one group; handed on to the group that takes its place.

    Args:
        stages: Whether the group's workers are `StagingWorker`s.
    """

    def __init__(self, stages: bool) -> None:
        self._stages = stages
        self._spares: list[_Spare] = []
        self._failures = 0

    def keep(self, count: int, slots: Mapping[str, Slot], model: Any, surroundings: Surroundings) -> None:
        """See that so many wait on each node. Costs next to nothing where they do.

        Args:
            count: How many on each node.
            slots: A reservation on each node, by its id.
            model: A worker's actor: what it has imported, they import.
            surroundings: Of the run's workers.
        """
        self._look()
        for node, slot in slots.items():
            here = [spare for spare in self._spares if spare.node == node]
            for spare in here[count:]:
                self._end(spare)
            for _ in range(count - len(here) if self._failures < MOST_FAILURES else 0):
                body = _deferred(StagingWorker if self._stages else RemoteWorker)
                actor = actor_class(body, self._stages).options(**options_in(slot, 0, 0)).remote()
                ready = actor.prepare.remote(model.imported.remote(), pickle.dumps(surroundings))
                self._spares.append(_Spare(node, actor, ready))

    def _look(self) -> None:
        """Say what those cost that are ready now, and forget those that have ended."""
        now = time.monotonic()
        for spare in list(self._spares):
            if spare.asked is None:
                if now >= spare.next:
                    spare.asked = spare.actor.__ray_ready__.remote()
                continue
            if not ray.wait([spare.asked], timeout=0)[0]:
                continue
            try:
                answer = ray.get(spare.asked)
            except RayError as error:
                log.info("A spare worker has ended: %s", str(error).splitlines()[0])
                self._failures += 1
                self._end(spare)
                continue
            if not spare.told:
                log.info("A spare worker is ready to take a lost one's place. It cost %s.", answer)
            spare.told, spare.asked, spare.next = True, None, now + LOOK_EVERY

    def any_on(self, nodes: Collection[str]) -> bool:
        """Whether one waits on one of these nodes."""
        return any(spare.node in nodes for spare in self._spares)

    def take(self, node: str) -> Any | None:
        """The actor of one that waits on a node, which is no spare any more; None: there is none."""
        self._look()
        here = [spare for spare in self._spares if spare.node == node]
        spare = next((spare for spare in here if spare.told), here[0] if here else None)
        if spare is None:
            return None
        self._spares.remove(spare)
        return spare.actor

    def close(self) -> None:
        """End them all."""
        for spare in list(self._spares):
            self._end(spare)

    def _end(self, spare: _Spare) -> None:
        self._spares.remove(spare)
        try:
            ray.kill(spare.actor)
        except RayError as error:
            log.debug("A spare could not be ended", exc_info=error)


def _deferred(body: type) -> type:
    """An actor's body that becomes a `body` by `prepare`, and then does what that does.

    It is pickled by value and names nothing of this package, which would be imported before its process could lower a
    thread's priority. (That of the process could not be raised again.)
    """
    home, name = body.__module__, body.__name__

    def __init__(self: Any) -> None:
        self.body = None

    def prepare(self: Any, names: list[str], surroundings: bytes) -> Any:
        import contextlib
        import importlib
        import os
        import threading

        # asked whether there is a GPU, CUDA would start and see for good those that this process sees now: none
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        answers: list[Any] = []

        def in_background() -> None:
            with contextlib.suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            readiness = importlib.import_module("raytrainer.worker.actor.readiness")
            answers.append(readiness.get_ready(names, surroundings))

        thread = threading.Thread(target=in_background)
        thread.start()
        thread.join()
        self.body = getattr(importlib.import_module(home), name)()
        return answers[0]

    members = {name: _passed_on(name, method) for name, method in inspect.getmembers(body, inspect.isfunction)}
    members = {name: member for name, member in members.items() if not name.startswith("_")}
    return type("SpareWorker", (), {**members, "__init__": __init__, "prepare": prepare})


def _passed_on(name: str, method: Any) -> Any:
    def passed_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.body, name)(*args, **kwargs)

    update_wrapper(passed_on, method, assigned=(), updated=("__dict__",))  # what `ray.method` has noted there
    del passed_on.__wrapped__  # type: ignore[attr-defined]
    return passed_on
