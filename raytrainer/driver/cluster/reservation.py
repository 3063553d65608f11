"""Reserving through Ray what `placement` decides on, waiting up to `placement_timeout` for it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from raytrainer.driver.cluster.answer_waits import wait_for
from raytrainer.driver.cluster.gpu_claims import claim
from raytrainer.driver.cluster.inherited import started_by_us
from raytrainer.driver.cluster.placement_rules import (
    ClusterNode,
    Request,
    Slot,
    gpus_of_every_node,
    refuse_impossible,
    share_out,
)
from raytrainer.driver.cluster.session import may_grow, nodes_gone, own_reservation, resources_text
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.gpu.nvml import Card, open_nvml
from raytrainer.quick_imports import end_importing
from raytrainer.signals import wait_until
from raytrainer.worker.actor.own_gpus import own_gpu_indices

__all__ = ["RayReserver", "all_gpus", "place", "place_more", "remove"]

log = logging.getLogger("raytrainer")

#: Seconds between questions whether a reservation has been given.
LOOK_EVERY = 0.03

#: Seconds for a small task to start and answer.
PATIENCE = 60.0


class RayReserver:
    """Reservations are placement groups of one bundle, which hold their GPU until they are removed."""

    def nodes(self) -> list[ClusterNode]:
        return [
            ClusterNode(
                node["NodeID"],
                node["NodeManagerAddress"],
                float(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def reserve(self, node: ClusterNode, cpus: float, gpus: int = 1) -> Any:
        bundle = {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if "bundle_label_selector" in inspect.signature(placement_group).parameters:
            return placement_group([bundle], bundle_label_selector=[{"ray.io/node-id": node.id}])
        return placement_group([{**bundle, f"node:{node.address}": 0.001}])

    def ready(self, groups: Sequence[Any], seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        # waiting for one is waiting for all; when time is up, each is only asked
        return [group for group in groups if _wait(group, max(0.0, deadline - time.monotonic()))]

    def held(self, groups: Sequence[Any]) -> list[int]:
        def given() -> list[str]:
            import ray

            return [str(value) for value in ray.get_gpu_ids()]

        # an inner function, so that the task need not import this package, and torch with it
        found = self._ask(given, groups)
        if not all(ids[0].isdigit() for ids in found):
            found = self._ask(own_gpu_indices, groups)
        return [int(ids[0]) for ids in found]

    @staticmethod
    def _ask(function: Callable[[], list[Any]], groups: Sequence[Any]) -> list[list[Any]]:
        """The answer of a task in each reservation. Its process may serve again: it does not touch the GPU."""
        task = ray.remote(num_cpus=0, num_gpus=1, max_calls=0)(function)
        places = [PlacementGroupSchedulingStrategy(group, 0) for group in groups]
        asked = [task.options(scheduling_strategy=place).remote() for place in places]
        answers: list[list[Any]] = _get(asked)
        return answers

    def give_back(self, groups: Sequence[Any]) -> None:
        for group in groups:
            remove_placement_group(group)

    def cards(self, node: ClusterNode) -> list[Card]:
        ask = ray.remote(num_cpus=0)(_cards)
        answer = ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
        try:
            found: list[Card] = _get([answer])[0]
        except RayError as error:
            log.warning("NVML of %s: %s", node.address, error)
            return []
        return found

    @property
    def grows(self) -> bool:
        return may_grow()

    def describe(self) -> str:
        return resources_text()


def _get(asked: list[Any]) -> list[Any]:
    """The answers of small tasks, heard of within `PATIENCE`."""
    wait_for(asked, PATIENCE)
    answers: list[Any] = ray.get(asked, timeout=0.1)
    return answers


def _pause(seconds: float) -> None:
    def nothing_comes(piece: float) -> bool:
        time.sleep(piece)
        return False

    wait_until(nothing_comes, seconds)


def _cards() -> list[Card]:
    nvml = open_nvml()
    return [] if nvml is None else nvml.cards()


def all_gpus(nodes: int) -> int:
    """GPUs of each node of the attached cluster; see `gpus_of_every_node` for its errors."""
    return gpus_of_every_node(RayReserver().nodes(), nodes)


def place(request: Request, timeout: float, begin: Callable[[list[Slot]], None] = lambda slots: None) -> list[Slot]:
    """One slot a worker, node by node. To be called within a `shield`.

    Args:
        request: What each is to have.
        timeout: Seconds to wait for them.
        begin: Called, if possible, with slots that Ray has but been asked for: what starts in them waits for them, and
            ends with them. (Where nothing does, Ray soon ends processes that it has ready, as too many for the CPUs
            that are left.)

    Raises:
        ResourceError: Not to be had, ever or within `timeout` seconds.
        ConfigurationError: Chosen GPUs that no node has.
    """
    own = own_reservation()
    if own is not None:
        return _place_within(own, request)
    reserver = RayReserver()
    if not reserver.nodes():
        raise ResourceError(f"{request}: {nodes_gone()}")
    if request.indices or request.free:
        end_importing()
        return claim(request, reserver, timeout, sleep=_pause)
    refuse_impossible(request, reserver, started_by_us())
    # one bundle a node, so that ranks of a node stay together
    bundle: dict[str, float] = {"CPU": request.cpus * request.per_node}
    if request.gpu:
        bundle["GPU"] = request.per_node
    strategy = "STRICT_SPREAD" if request.nodes > 1 else "STRICT_PACK"
    ray.put(None)  # has Ray import now what it sends things with
    group = placement_group([bundle] * request.nodes, strategy=strategy)
    slots = [Slot(group, node, request.cpus) for node in range(request.nodes) for _ in range(request.per_node)]
    try:
        begin(slots)
        _wait_for(group, request, timeout)
    except BaseException:
        remove_placement_group(group)  # it would wait for ever, and take what it gets
        raise
    return slots


def place_more(request: Request, counts: Mapping[str, int], seconds: float) -> list[Slot]:
    """Slots for further workers of a group: so many on each node, by its id. To be called within a `shield`.

    Raises:
        ResourceError: Not to be had within so many seconds.
    """
    reserver = RayReserver()
    if request.indices or request.free:
        if any(count != request.per_node for count in counts.values()):
            raise ResourceError(f"{request}: GPUs are chosen for whole nodes only, once there are workers on a node.")
        return claim(replace(request, nodes=len(counts)), reserver, seconds, sleep=_pause)
    nodes = {node.id: node for node in reserver.nodes()}
    groups: list[Any] = []
    try:
        for node, count in counts.items():
            if node not in nodes:
                raise ResourceError(f"{request}: a node has gone meanwhile.")
            groups.append(reserver.reserve(nodes[node], request.cpus * count, count if request.gpu else 0))
        if len(reserver.ready(groups, seconds)) < len(groups):
            raise ResourceError(f"{request}: what looked free is not; the cluster has {resources_text()}.")
    except BaseException:
        reserver.give_back(groups)
        raise
    return [Slot(g, 0, request.cpus) for g, count in zip(groups, counts.values(), strict=True) for _ in range(count)]


def _wait_for(group: Any, request: Request, timeout: float) -> None:
    """Wait until Ray has given what a placement group asks for.

    Raises:
        ResourceError: Not within `timeout` seconds.
    """
    began = time.monotonic()
    if _wait(group, min(timeout, 5.0)):
        return
    end_importing()
    log.warning("Waiting up to %.0f s for %s; the cluster has %s.", timeout, request, resources_text())
    if not _wait(group, timeout - (time.monotonic() - began)):
        raise ResourceError(
            f"{request}: not to be had within {timeout:.0f} s; the cluster has {resources_text()}. Ask for fewer "
            f"workers, free what other jobs hold, or add nodes."
        )


def _wait(group: Any, seconds: float) -> bool:
    """Whether Ray gives what a placement group asks for within so many seconds.

    It is asked again and again: its own way of waiting is deaf to signals, and counts whole seconds only.
    """

    def given(at_most: float) -> bool:
        if group.wait(0):
            return True
        time.sleep(min(at_most, LOOK_EVERY))
        return False

    return wait_until(given, seconds)


def remove(slots: Sequence[Slot]) -> None:
    """Give reservations back, but for those that are somebody else's."""
    for group in {slot.group.id: slot.group for slot in slots if not slot.borrowed}.values():
        with contextlib.suppress(RayError):
            remove_placement_group(group)


def _place_within(group: Any, request: Request) -> list[Slot]:
    """Slots in the reservation that this process runs in. Asking the cluster for more could wait for ever: for others
    like this one, which hold what they have and ask for more as well.

    Raises:
        ResourceError: It has no room for all workers.
        ConfigurationError: GPUs are chosen, which Ray has done already.
    """
    if request.indices or request.free:
        raise ConfigurationError(
            f"{request}: this process runs in a reservation of its own (a Ray Tune trial?), for which Ray has chosen "
            f"the GPUs already: give gpus as a number, and leave auto_select_gpus out."
        )
    specs = [dict(spec) for spec in group.bundle_specs]
    for name, used in ray.get_runtime_context().get_assigned_resources().items():
        # what this process itself uses came out of the first bundle that has it
        first = next((spec for spec in specs if spec.get(name, 0) >= used), {})
        first[name] = first.get(name, 0) - used
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    bundles = [(nodes[i], spec.get("CPU", 0.0), spec.get("GPU", 0.0)) for i, spec in enumerate(specs)]
    places = share_out(request, bundles)
    if places is None:
        raise ResourceError(
            f"{request}: this process runs in a reservation of its own (a Ray Tune trial?), {group.bundle_specs}, "
            f"which has no room for that. Reserve it together: tune.with_resources(function, raytrainer.tune_resources("
            f"{'gpus' if request.gpu else 'num_processes'}={request.per_node}"
            f"{f', num_nodes={request.nodes}' if request.nodes > 1 else ''}))."
        )
    return [Slot(group, index, request.cpus, borrowed=True) for index in places]
