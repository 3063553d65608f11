"""`MorePlaces`: room for further workers, reserved and tried while those that there are train on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrainer.driver.cluster.placement_rules import Request, Slot
from raytrainer.driver.cluster.reservation import remove
from raytrainer.errors import ResourceError
from raytrainer.worker.actor.place import own_versions

__all__ = ["MorePlaces"]

#: Seconds that a process gets to start in a new place and to import what a worker imports.
PATIENCE = 300.0


@dataclass
class MorePlaces:
    """Where a larger group would have its further workers.

    Args:
        request: The larger group's.
        slots: Reserved for the further workers.
        stay: How many of the present group's places it takes up on each node.
    """

    request: Request
    slots: Sequence[Slot]
    stay: Mapping[str, int]
    _tried: list[Any] = field(default_factory=list)
    _until: float = field(default_factory=lambda: time.monotonic() + PATIENCE)

    def try_out(self) -> None:
        """Have a process started in each place. Ray keeps it for a worker, which then need not import anything."""
        gpus = 1 if self.request.gpu else 0
        task = ray.remote(num_gpus=gpus, max_retries=0, max_calls=0)(own_versions)
        for slot in self.slots:
            there = PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle)
            self._tried.append(task.options(num_cpus=slot.cpus, scheduling_strategy=there).remote())

    def sure(self) -> bool:
        """Whether all of them have started; never waits.

        Raises:
            ResourceError: One cannot.
        """
        ready, pending = ray.wait(self._tried, num_returns=len(self._tried), timeout=0)
        try:
            ray.get(ready)
        except RayError as error:
            raise ResourceError(f"{self.request}: no worker starts in a new place: {error}") from error
        if pending and time.monotonic() > self._until:
            raise ResourceError(f"{self.request}: no worker starts in a new place within {PATIENCE:.0f} s.")
        return not pending

    def give_back(self) -> None:
        """They are not needed."""
        remove(self.slots)
