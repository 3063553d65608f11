"""Which worker is which: global, local and node ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["Ranks", "assign_ranks"]


@dataclass(frozen=True)
class Ranks:
    """One worker's place. Ranks run node by node, so that neighbours in rank share a node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1


def assign_ranks(nodes: Sequence[Hashable]) -> list[Ranks]:
    """Ranks for workers on the given nodes, in the order given: nodes rank by first appearance.

    Example:
        Workers on nodes ["a", "b", "a", "b"] get global ranks [0, 2, 1, 3].
    """
    order = list(dict.fromkeys(nodes))
    members = {node: [i for i, other in enumerate(nodes) if other == node] for node in order}
    ranks: dict[int, Ranks] = {}
    for node_rank, node in enumerate(order):
        for local_rank, worker in enumerate(members[node]):
            ranks[worker] = Ranks(
                rank=len(ranks),
                world_size=len(nodes),
                local_rank=local_rank,
                local_world_size=len(members[node]),
                node_rank=node_rank,
                num_nodes=len(order),
            )
    return [ranks[i] for i in range(len(nodes))]
