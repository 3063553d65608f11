"""`GroupSupply`: where the workers of a Trainer come from, and go to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from raytrainer.driver.cluster.placement_rules import Request, additions, fits
from raytrainer.driver.cluster.resources import draining_nodes, free_by_node
from raytrainer.driver.cluster.session import Cluster, ensure_ray, own_reservation
from raytrainer.driver.workers import idle_pool
from raytrainer.driver.workers.local_group import LocalGroup, local_group
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.plan.settings import Settings

if TYPE_CHECKING:
    from raytrainer.driver.workers.ray_more_places import MorePlaces

__all__ = ["GroupSupply"]

log = logging.getLogger("raytrainer")

#: Seconds to reserve what looks free, beside workers that wait.
BRIEFLY = 3.0


class GroupSupply:
    """Worker groups: in this process, or of a Ray cluster.

    Args:
        cluster: The cluster, if one is used.
        placement_timeout: Seconds to wait until it has what is asked for.
        idle_timeout: Seconds that groups given back are kept for the next run.
    """

    def __init__(self, cluster: Cluster, placement_timeout: float, idle_timeout: float) -> None:
        self.cluster = cluster
        self._placement_timeout, self._idle_timeout = placement_timeout, idle_timeout

    def prepare(self, settings: Settings) -> None:
        """Find or start what workers are taken from: Ray, if they are its."""
        if settings.strategy != "local":
            ensure_ray(self.cluster, settings.world_size, settings.gpus)

    def take(self, settings: Settings, sizes: Sequence[int] = ()) -> WorkerGroup:
        """The workers that the settings ask for; of an elastic run as many of them as there are.

        To be called after `prepare`, and within a `shield`, with what keeps the answer.

        Args:
            settings: Of the run.
            sizes: Numbers of workers that are known to have room now; others are not tried.
        """
        if settings.strategy == "local":
            return local_group(settings)
        from raytrainer.driver.workers.ray_group import RayGroup

        requests = _requests(settings)
        known = [request for request in requests if request.nodes * request.per_node in sizes]
        return idle_pool.take(known or requests, self._placement_timeout, RayGroup)

    def mend_or_take(self, settings: Settings, wounded: WorkerGroup | None, held: Sequence[WorkerGroup]) -> WorkerGroup:
        """A group of those left of a `wounded` one, or, where that cannot be, a new one; groups `held` end before it.

        To be called as `take`.
        """
        group = None if wounded is None else wounded.mended()
        if group is not None:
            return group
        for over in held:
            over.abort()
        return self.take(settings)

    def give_back(self, group: WorkerGroup) -> None:
        """The run is over: workers of a cluster are kept for the next one that asks for the same."""
        idle_pool.set_idle_timeout(self._idle_timeout)
        group.release()
        if not isinstance(group, LocalGroup):
            idle_pool.put_back(cast(idle_pool.IdleGroup, group))

    def can_grow(self, settings: Settings, group: WorkerGroup) -> bool:
        """Whether an elastic run could have more workers than `group` has."""
        larger = [(nodes, workers) for nodes, workers in settings.sizes if nodes * workers > group.size]
        if not larger or own_reservation() is not None:
            return False
        free = free_by_node("GPU" if settings.on_gpu else "CPU")
        return any(fits(nodes, workers, free, group.by_node) for nodes, workers in larger)

    def more_places(self, settings: Settings, group: WorkerGroup) -> MorePlaces | None:
        """Reserve places for more workers than `group` has, and have processes started there; None: others have them.

        To be called within a `shield`, with what keeps the answer.
        """
        from raytrainer.driver.cluster.reservation import place_more
        from raytrainer.driver.workers.ray_more_places import MorePlaces

        free = free_by_node("GPU" if settings.on_gpu else "CPU")
        for request in _requests(settings):
            by_node = additions(request.nodes, request.per_node, free, group.by_node)
            if by_node is None or request.nodes * request.per_node <= group.size:
                continue
            counts = {node: count for node, (_, count) in by_node.items() if count}
            try:
                slots = place_more(request, counts, BRIEFLY)
            except (ResourceError, ConfigurationError) as error:  # others were faster
                log.info("No more workers for now: %s", error)
                continue
            places = MorePlaces(request, slots, {node: stay for node, (stay, _) in by_node.items()})
            places.try_out()
            return places
        return None

    def grow(self, group: WorkerGroup, places: MorePlaces) -> WorkerGroup:
        """A group of the workers of `group`, which ends, and of others in these places.

        To be called within a `shield`, with what keeps the answer.
        """
        from raytrainer.driver.workers.ray_group import RayGroup

        assert isinstance(group, RayGroup)
        return group.grown(places.request, places.slots, places.stay)

    def leaving(self, group: WorkerGroup) -> dict[str, float]:
        """Nodes with workers of this group that are to go, by id, and in how many seconds each will."""
        by_node = group.by_node
        return {node: left for node, left in draining_nodes().items() if node in by_node} if by_node else {}

    def elsewhere(self, settings: Settings, group: WorkerGroup) -> list[int]:
        """Sizes, the most first, of groups that have room without nodes that are to go, once `group` has ended."""
        free = free_by_node("GPU" if settings.on_gpu else "CPU")
        return [nodes * workers for nodes, workers in settings.sizes if fits(nodes, workers, free, group.by_node)]

    def with_every_gpu(self, settings: Settings) -> Settings:
        """The settings with what gpus=-1 means on the cluster as it is now."""
        ensure_ray(self.cluster, 1, settings.gpus)
        from raytrainer.driver.cluster.reservation import all_gpus

        count = all_gpus(settings.num_nodes)
        return replace(settings, gpus=count, fewest_per_node=count)


def _requests(settings: Settings) -> list[Request]:
    """The resources that would do, best first."""
    indices = settings.gpus if isinstance(settings.gpus, tuple) else ()
    return [
        Request(nodes, workers, settings.on_gpu, indices=indices, free=settings.auto_select_gpus)
        for nodes, workers in settings.sizes
    ]
