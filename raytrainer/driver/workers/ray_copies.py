"""`SecondCopies`: on several nodes, each one's shards are in the memory of another node too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.worker.actor.keeper import Keeper

__all__ = ["SecondCopies"]


class SecondCopies:
    """A keeper on each node. Who holds this object holds their copies: without it, Ray ends them.

    Args:
        nodes: By rank, the ids of the nodes.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = list(nodes)
        order = list(dict.fromkeys(nodes))
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True)) if len(order) > 1 else {}
        self._keepers: dict[str, Any] = {}

    def hold(self, refs: Sequence[Any]) -> list[Any]:
        """Have each node's neighbour copy what there is on it, beside training.

        Args:
            refs: By rank, Ray's references.

        Returns:
            References to the answers, for who wants to wait.
        """
        asked = []
        for node, neighbour in self._next.items():
            theirs = [ref for ref, where in zip(refs, self._nodes, strict=True) if where == node]
            asked.append(self._keeper(neighbour).hold.remote(theirs))
        return asked

    def _keeper(self, node: str) -> Any:
        if node not in self._keepers:
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            self._keepers[node] = ray.remote(num_cpus=0)(Keeper).options(scheduling_strategy=place).remote()
        return self._keepers[node]
