"""Chosen or free GPUs: reserved through Ray, waiting up to `placement_timeout` for them.

Ray chooses the GPUs that it hands out. Chosen ones are got by reserving every GPU of a node that is free, one by one,
asking each reservation which GPU it holds, keeping those wanted and giving the others back before anything starts. So
Ray's own accounting always tells who has which GPU, and two jobs never share one by accident.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from raytrainer.driver.cluster.placement_rules import ClusterNode, Request, Reserver, Slot
from raytrainer.errors import ResourceError
from raytrainer.gpu.choice import check_present, describe_loads, free_first, index_text

__all__ = ["claim"]

log = logging.getLogger("raytrainer")

#: Seconds in which Ray reserves what is free; what has not come by then is held by others.
SETTLE = 3.0


class _Absent(Exception):
    """A node lacks a chosen GPU; `present` are those that it has."""

    def __init__(self, present: list[int]) -> None:
        super().__init__()
        self.present = present


def claim(
    request: Request,
    reserver: Reserver,
    timeout: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Slot]:
    """Reserve chosen or free GPUs; one slot a worker, node by node, in PCI order on each.

    Whoever does not get all it wants gives everything back before it tries again, so two jobs that want the same
    GPUs do not wait for each other.

    Args:
        request: With `indices` or `free`.
        reserver: Ray.
        timeout: Seconds to go on trying.
        sleep: Waits between tries.
        clock: Seconds.

    Raises:
        ConfigurationError: No node has the chosen GPUs, and none may yet join; says what is there.
        ResourceError: They were not free within `timeout`; says what was.
    """
    deadline, told = clock() + timeout, False
    while True:
        slots: list[Slot] = []
        found, absent, seen = 0, {}, []
        for node in [n for n in reserver.nodes() if n.gpus >= (1 if request.indices else request.per_node)]:
            try:
                claimed, state = _claim_node(request, reserver, node)
            except _Absent as error:
                absent[node] = error.present
                continue
            except BaseException:
                reserver.give_back([slot.group for slot in slots])
                raise
            seen.append(f"{node.address}: {state}")
            if claimed:
                slots, found = [*slots, *claimed], found + 1
                if found == request.nodes:
                    log.info("%s: %s", "auto_select_gpus" if request.free else "gpus", "; ".join(seen))
                    return slots
        reserver.give_back([slot.group for slot in slots])
        if absent and not reserver.grows and len(seen) < request.nodes:
            node, present = next(iter(absent.items()))
            check_present(request.indices, present, "this node" if len(absent) == 1 else f"node {node.address}")
        if clock() >= deadline:
            raise ResourceError(
                f"{request}: not to be had within {timeout:.0f} s. {'; '.join(seen) or reserver.describe()}. The "
                f"cluster has {reserver.describe()}."
            )
        if not told:
            log.warning("Waiting up to %.0f s for %s. %s.", timeout, request, "; ".join(seen) or reserver.describe())
            told = True
        sleep(random.uniform(0.2, 1.0))


def _claim_node(request: Request, reserver: Reserver, node: ClusterNode) -> tuple[list[Slot], str]:
    """The wanted GPUs of one node, or none; and what was seen there.

    Raises:
        _Absent: The node lacks a chosen GPU.
    """
    cards = reserver.cards(node)
    if request.indices and cards and not set(request.indices) <= {card.index for card in cards}:
        raise _Absent([card.index for card in cards])
    if request.free and len(free_first(cards)) < request.per_node:
        return [], describe_loads(cards) if cards else "NVML cannot be asked there"
    # all of the node's GPUs must fit at once
    cpus = request.cpus if node.cpus >= node.gpus * request.cpus else 0.0
    groups: list[Any] = []
    kept: list[Any] = []
    try:
        for _ in range(node.gpus):
            groups.append(reserver.reserve(node, cpus))
        ready = reserver.ready(groups, SETTLE)
        by_index = dict(zip(reserver.held(ready), ready, strict=True)) if ready else {}
        if request.indices:
            wanted = [i for i in request.indices if i in by_index]
            if len(wanted) < len(request.indices) and len(ready) == node.gpus:
                raise _Absent(sorted(by_index))
        else:
            wanted = [i for i in free_first(cards) if i in by_index][: request.per_node]
        if len(wanted) < request.per_node:
            return [], f"{index_text(by_index)} not held by others, of {node.gpus}"
        kept = [by_index[index] for index in sorted(wanted)]
        return [Slot(group, cpus=cpus) for group in kept], f"{index_text(wanted)} taken" + (
            f" ({describe_loads(cards)})" if request.free else ""
        )
    finally:
        reserver.give_back([group for group in groups if group not in kept])
