"""What a cluster's nodes have that nobody holds, which of them are to go, and who waits for what."""

from __future__ import annotations

import math
import time
from collections.abc import Set

from raytrainer.private import ray_private

__all__ = ["draining_nodes", "free_by_node", "somebody_waits"]


def free_by_node(name: str) -> dict[str, float]:
    """How much of "CPU" or "GPU" nobody holds on each living node, by its id."""
    import ray
    from ray.util.client import ray as client

    # a client knows but the sums; the cluster's own processes know more
    nodes = (
        ray.get(ray.remote(num_cpus=0)(ray_private.free_on_nodes).remote())
        if client.is_connected()
        else ray_private.free_on_nodes()
    )
    gone = draining_nodes()  # these take nobody any more
    return {node: float(has.get(name, 0.0)) for node, has in nodes.items() if node not in gone}


def draining_nodes() -> dict[str, float]:
    """Nodes that are to go, by id, with the seconds that they have left (infinity where nobody says).

    Their autoscaler, or a notice of preemption, has told Ray.
    """
    import ray
    from ray.util.client import ray as client

    deadlines: dict[str, int] = (
        ray.get(ray.remote(num_cpus=0)(ray_private.draining).remote())
        if client.is_connected()
        else ray_private.draining()
    )
    now = time.time()
    return {node: at / 1000 - now if at else math.inf for node, at in deadlines.items()}


def somebody_waits(kinds: Set[str]) -> bool:
    """Whether a task, an actor or a placement group waits for nothing but resources of these kinds, such as "CPU".

    A request counts if some node could serve it once resources of these kinds were given up: not where no node has
    so many, nor where it waits for something else as well. False where Ray does not tell: to a Ray Client, say.
    """
    found = ray_private.demand()
    if found is None:
        return False

    def could_be_had(bundle: dict[str, float]) -> bool:
        return any(
            all((total if name in kinds else free).get(name, 0.0) >= amount for name, amount in bundle.items())
            for total, free in found.nodes
        )

    return any(
        any(kinds & bundle.keys() for bundle in bundles) and all(could_be_had(bundle) for bundle in bundles)
        for bundles in found.waiting
    )
