"""Finding or starting Ray. Never starts a second one by accident, never ends one that it did not start."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

__all__ = ["attached", "ensure_ray", "free_resources", "may_grow", "own_reservation", "resources_text"]

log = logging.getLogger("raytrainer")


def attached(address: str | None) -> bool:
    """Whether a cluster is in use already, or named, without importing ray to find out."""
    ray = sys.modules.get("ray")
    return address is not None or bool(os.environ.get("RAY_ADDRESS")) or bool(ray is not None and ray.is_initialized())


def own_reservation() -> Any | None:
    """The placement group that this very process runs in: that of a Ray Tune trial, say. None in an ordinary driver."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return ray.util.get_current_placement_group()


def ensure_ray(address: str | None, workers: int) -> None:
    """Use the Ray that is initialised, or attach to `address` or RAY_ADDRESS, or start one here.

    A Ray started here has at least one CPU more than there are workers, so that data tasks can run beside them.
    """
    import ray

    if ray.is_initialized():
        return
    if address is not None or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        return
    cpus = max(os.cpu_count() or 1, workers + 1)
    log.info("Starting Ray on this machine, with %d CPUs.", cpus)
    # without FutureWarning about accelerator variables, which concerns tasks without GPUs
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray gives its workers a low priority by default; here training is what the machine is for
    os.environ.setdefault("RAY_worker_niceness", "0")
    # "local": otherwise Ray looks for a cluster that runs on this machine, and then refuses num_cpus
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)


def free_resources(name: str) -> float:
    """How much of "CPU" or "GPU" nobody in the cluster holds."""
    import ray

    return float(ray.available_resources().get(name, 0.0))


def may_grow() -> bool:
    """Whether nodes could join, through an autoscaler or a person: not where this very process has started Ray."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return node is None or not getattr(node, "head", False)


def resources_text() -> str:
    """What the cluster has and what of it is free, for error messages."""
    import ray

    total: dict[str, Any] = ray.cluster_resources()
    free: dict[str, Any] = ray.available_resources()
    parts = [f"{name} {free.get(name, 0):g} of {total[name]:g} free" for name in ("CPU", "GPU") if name in total]
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return f"{', '.join(parts) or 'no CPU'} on {nodes} node(s)"
