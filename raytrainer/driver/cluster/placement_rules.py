"""Where workers go: what is asked of Ray for a group, and which nodes would do. What waits for it: `reservation`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.gpu.choice import index_text
from raytrainer.gpu.nvml import Card

__all__ = [
    "ClusterNode",
    "Request",
    "Reserver",
    "Slot",
    "additions",
    "fits",
    "gpus_of_every_node",
    "refuse_impossible",
    "share_out",
]

log = logging.getLogger("raytrainer")


@dataclass(frozen=True)
class Request:
    """The resources of a group; groups with equal requests are interchangeable.

    Attributes:
        nodes: Nodes to use.
        per_node: Workers on each.
        gpu: Whether each worker has a GPU.
        cpus: CPUs per worker, as Ray counts them.
        indices: The GPUs to use on every node, in PCI bus order; empty: any.
        free: Use GPUs that NVML shows free, least loaded first.
    """

    nodes: int
    per_node: int
    gpu: bool = False
    cpus: float = 1.0
    indices: tuple[int, ...] = ()
    free: bool = False

    def __str__(self) -> str:
        kind = "CPU and a GPU" if self.gpu else "CPU"
        which = f" ({index_text(self.indices)} in PCI order)" if self.indices else " that is free" if self.free else ""
        return f"{self.per_node} worker(s) on each of {self.nodes} node(s), each worker with a {kind}{which}"


@dataclass(frozen=True)
class ClusterNode:
    """A living node: its id, its address, and what it has in all."""

    id: str
    address: str
    cpus: float
    gpus: int


@dataclass(frozen=True)
class Slot:
    """One worker's reservation: a placement group, the bundle in it, and the CPUs it has for the worker.

    A `borrowed` group is somebody else's (a Ray Tune trial's), and not ours to remove.
    """

    group: Any
    bundle: int = 0
    cpus: float = 1.0
    borrowed: bool = False


class Reserver(Protocol):
    """What `claim` needs of Ray."""

    def nodes(self) -> list[ClusterNode]:
        """Living nodes."""

    def reserve(self, node: ClusterNode, cpus: float) -> Any:
        """Begin to reserve one GPU, and CPUs, on a node."""

    def ready(self, groups: Sequence[Any], seconds: float) -> list[Any]:
        """Those that hold their GPU, once all do or after `seconds`."""

    def held(self, groups: Sequence[Any]) -> list[int]:
        """PCI index of the GPU that each holds."""

    def give_back(self, groups: Sequence[Any]) -> None:
        """End reservations."""

    def cards(self, node: ClusterNode) -> list[Card]:
        """What NVML says on a node; empty where it cannot be asked."""

    @property
    def grows(self) -> bool:
        """Whether nodes may yet join."""

    def describe(self) -> str:
        """What the cluster has."""


def fits(nodes: int, per_node: int, free: Mapping[str, float], held: Mapping[str, int]) -> bool:
    """Whether so many workers would fit on so many nodes, once the present ones are gone.

    Args:
        nodes: Nodes to use.
        per_node: Workers on each.
        free: CPUs or GPUs (whichever each worker takes one of) that nobody holds, by node.
        held: Present workers, by node.
    """
    return sum(free[node] + held.get(node, 0) >= per_node for node in free) >= nodes


def additions(
    nodes: int, per_node: int, free: Mapping[str, float], held: Mapping[str, int]
) -> dict[str, tuple[int, int]] | None:
    """Where a group of so many workers would be: by node, how many of those present stay, and how many are added.

    Args: As for `fits`.

    Returns:
        None if there is no room. Nodes that have workers come first, so that few have to be added.
    """
    able = [node for node in {**held, **free} if free.get(node, 0.0) + held.get(node, 0) >= per_node]
    if len(able) < nodes:
        return None
    chosen = sorted(able, key=lambda node: -min(held.get(node, 0), per_node))[:nodes]
    staying = {node: min(held.get(node, 0), per_node) for node in chosen}
    return {node: (stay, per_node - stay) for node, stay in staying.items()}


def refuse_impossible(request: Request, reserver: Reserver, started_here: bool = False) -> None:
    """Refuse what the nodes, all of them idle, could not give, where no node may yet join.

    Args:
        request: What is wanted.
        reserver: Of the cluster.
        started_here: Whether Ray was started for an earlier run's workers, and would be for this one's.

    Raises:
        ResourceError: Says what the cluster has.
    """
    nodes = reserver.nodes()
    cpus, gpus = request.cpus * request.per_node, request.per_node if request.gpu else 0
    able = [node for node in nodes if node.cpus >= cpus and node.gpus >= gpus]
    if len(able) >= request.nodes or reserver.grows:
        return
    each = "; ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus} GPU" for node in nodes)
    without = request.gpu and not any(node.gpus for node in nodes)
    remedy = "Ask for fewer workers or nodes"
    if without:
        remedy = "No node has a GPU: num_processes=2, without gpus, trains on CPUs"
    elif started_here and request.nodes == 1 and not request.gpu:
        remedy += ", or call ray.shutdown() before fit: this Ray was started for fewer, and another one is then"
    raise ResourceError(
        f"{request}: not to be had; the cluster has {reserver.describe()} in all ({each}), and nobody would add to "
        f"it. {remedy}."
    )


def share_out(request: Request, bundles: Sequence[tuple[str, float, float]]) -> list[int] | None:
    """Places for a group's workers in a reservation that is there already.

    Args:
        request: Without chosen GPUs.
        bundles: Of each bundle: its node, and the CPUs and GPUs in it that nobody uses.

    Returns:
        The bundle of each worker, node by node; None if there is no room for all.
    """
    by_node: dict[str, list[int]] = {}
    for index, (node, cpus, gpus) in enumerate(bundles):
        fit = int(cpus // request.cpus)
        by_node.setdefault(node, []).extend([index] * (min(fit, int(gpus)) if request.gpu else fit))
    chosen = [places[: request.per_node] for places in by_node.values() if len(places) >= request.per_node]
    if len(chosen) < request.nodes:
        return None
    return [index for places in chosen[: request.nodes] for index in places]


def gpus_of_every_node(nodes: Sequence[ClusterNode], wanted: int) -> int:
    """What `gpus=-1` means on a cluster: the number of GPUs of each node that has any.

    Args:
        nodes: All nodes.
        wanted: Nodes to train on.

    Raises:
        ResourceError: There are too few nodes with GPUs.
        ConfigurationError: Nodes have different numbers of them.
    """
    having = [node for node in nodes if node.gpus]
    if len(having) < wanted:
        raise ResourceError(
            f"gpus=-1 on {wanted} node(s): {len(having)} of the cluster's {len(nodes)} node(s) have GPUs. gpus=0 "
            f"trains on CPUs."
        )
    if len({node.gpus for node in having}) > 1:
        each = ", ".join(f"{node.address} has {node.gpus}" for node in having)
        raise ConfigurationError(f"gpus=-1: nodes have different numbers of GPUs ({each}); give a number per node.")
    return having[0].gpus
