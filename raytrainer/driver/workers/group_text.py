"""Where the workers of a group are, in a few words."""

from __future__ import annotations

from collections.abc import Sequence

from raytrainer.worker.actor.place import Place

__all__ = ["described"]

#: Nodes that are named; of more, the last ones are counted.
SHOWN = 8


def described(places: Sequence[Place], of: str) -> str:
    """E.g. "4 workers on 2 nodes of 10.0.0.1:6379: h1 gpu 0,1; h2 gpu 0,1".

    Args:
        places: Of the workers, by rank.
        of: What follows the number of nodes.
    """
    by_node: dict[str, list[Place]] = {}
    for place in places:
        by_node.setdefault(place.node_id, []).append(place)
    nodes = []
    for here in list(by_node.values())[:SHOWN]:
        gpus = [str(index) for place in here for index in place.gpus]
        nodes.append(f"{here[0].host} gpu {','.join(gpus)}" if gpus else f"{here[0].host} cpu x{len(here)}")
    if len(by_node) > SHOWN:
        nodes.append(f"and {len(by_node) - SHOWN} more")
    workers = f"{len(places)} worker{'s' if len(places) > 1 else ''}"
    return f"{workers} on {len(by_node)} node{'s' if len(by_node) > 1 else ''}{of}: {'; '.join(nodes)}"
