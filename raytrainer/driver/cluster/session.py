"""Finding or starting Ray. Never starts a second one by accident, never ends one that it did not start."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.driver.cluster import inherited
from raytrainer.driver.cluster.attaching import answers, attach, host_and_port
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.gpu.choice import require_cuda, require_gpu
from raytrainer.gpu.nvml import open_nvml
from raytrainer.plan.uris import absolute
from raytrainer.private import ray_private
from raytrainer.signals import shield, sigterm_kept

__all__ = [
    "Cluster",
    "attached",
    "ensure_ray",
    "explain_lost",
    "free_resources",
    "may_grow",
    "nodes_alive",
    "nodes_gone",
    "own_reservation",
    "place_name",
    "resources_text",
    "started_here",
]

log = logging.getLogger("raytrainer")


@dataclass(frozen=True)
class Cluster:
    """Which Ray a trainer uses, and what workers need there beside what is installed. `Trainer` documents both."""

    address: str | None = None
    runtime_env: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.address is not None and not (isinstance(self.address, str) and self.address):
            raise ConfigurationError(
                f"address={self.address!r}: give 'auto', 'local', 'HOST:PORT' of a cluster that this machine belongs "
                f"to, 'ray://HOST:PORT' of one that it does not, or None."
            )
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise ConfigurationError(f"runtime_env={self.runtime_env!r}: give a dict, as for ray.init, or None.")

    @property
    def named(self) -> str | None:
        """The address that was given, here or by RAY_ADDRESS."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


def attached(cluster: Cluster) -> bool:
    """Whether a cluster is in use already, or named, without importing ray to find out."""
    ray = sys.modules.get("ray")
    named = cluster.named
    return (named is not None and named != "local") or bool(ray is not None and ray.is_initialized())


def own_reservation() -> Any | None:
    """The placement group that this very process runs in: that of a Ray Tune trial, say. None in an ordinary driver."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return ray.util.get_current_placement_group()


def ensure_ray(cluster: Cluster, workers: int, gpus: object = None) -> None:
    """Use the Ray that is initialised, or attach to the one that is named or runs on this machine, or start one here.

    A Ray started here has at least one CPU more than there are workers, so that data tasks can run beside them.

    Args:
        cluster: What was named.
        workers: How many there will be.
        gpus: The Trainer's argument, if it asks for GPUs: a Ray is not started here where there are none.

    Raises:
        ConfigurationError: The named cluster is not there, lets us not in, or runs other versions; or this process is
            attached to another one.
    """
    import ray

    ray_private.show_every_line()
    if inherited.started_by_us() and not any(node["Alive"] for node in ray.nodes()):
        log.warning("The Ray that was started here has no node any more; starting another one.")
        ray.shutdown()
    if ray.is_initialized():
        _refuse_other(cluster.address)
        inherited.compare(cluster.runtime_env)
        return
    named = cluster.named
    if named == "local":
        _start(workers, gpus, cluster.runtime_env)
        return
    if named in (None, "auto"):
        running = _running_here()
        if running is None and named is None:
            _start(workers, gpus, cluster.runtime_env)
            return
        if running is None:
            raise ConfigurationError(
                "address='auto': no Ray runs on this machine. `ray start --head` starts one; 'ray://HOST:10001' "
                "names one elsewhere; None starts one when there is none."
            )
        named = running
    attach(named, cluster.runtime_env)
    inherited.remember(cluster.runtime_env)


def _start(workers: int, gpus: object, runtime_env: Mapping[str, Any] | None) -> None:
    if gpus:
        require_gpu(gpus, open_nvml())
        require_cuda()
    absolute("", "Ray cannot start")  # it asks for the working directory too
    import ray

    there = os.cpu_count() or 1
    cpus = max(there, workers + 1)
    if workers > there and not gpus:
        log.warning(
            "%d workers share the %d CPU(s) of this machine: more workers than CPUs train slower.", workers, there
        )
    beside = f": one for each worker, and one for data; the machine has {there}" if cpus > there else ""
    log.info("Starting Ray on this machine, with %d CPUs%s.", cpus, beside)
    # without FutureWarning about accelerator variables, which concerns tasks without GPUs
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray gives its workers a low priority by default; here training is what the machine is for
    os.environ.setdefault("RAY_worker_niceness", "0")
    # "local": otherwise Ray looks for a cluster that runs on this machine, and then refuses num_cpus
    try:
        with sigterm_kept(), ray_private.quiet_token_notice():
            ray.init(
                "local", num_cpus=cpus, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING,
                runtime_env=dict(runtime_env or {}),
            )  # fmt: skip
    except BaseException as error:  # Ctrl-C, say
        with shield():
            ray_private.end_half_started(error)
            ray.shutdown()
        raise
    inherited.remember(runtime_env, by_us=True)


def _running_here() -> str | None:
    """The address of the cluster that `ray start` has started or joined on this machine, if it still answers."""
    address = ray_private.running_address()
    place = host_and_port(address)
    # what has ended may have left its address behind
    return address if place is not None and answers(*place, 1.0) else None


def _refuse_other(address: str | None) -> None:
    """An explicit address must be that of the Ray this process uses."""
    own = address == "local" and (started_here() or own_reservation() is not None)
    if own or address in (None, "auto") or (address != "local" and _same_place(address, place_name())):
        return
    raise ConfigurationError(
        f"address={address!r}: this process uses the Ray at {place_name()} already. Leave address out to train there, "
        f"or call ray.shutdown() first."
    )


def _same_place(one: str, other: str) -> bool:
    """Whether two addresses mean the same port of the same machine."""
    if one == other:
        return True
    places = host_and_port(one), host_and_port(other)
    if places[0] is None or places[1] is None or places[0][1] != places[1][1]:
        return False
    if one.startswith("ray://") != other.startswith("ray://"):
        return False
    try:
        addresses = {socket.gethostbyname(places[0][0]), socket.gethostbyname(places[1][0])}
    except OSError:
        return False
    import ray

    # a name for this machine is as good as its address
    return len(addresses - {"127.0.0.1", "127.0.1.1", ray.util.get_node_ip_address()}) == 0 or len(addresses) == 1


def place_name() -> str:
    """The address of the Ray in use: "ray://HOST:PORT" or "HOST:PORT"."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return f"ray://{ray_private.client_address(client)}"
    return str(ray.get_runtime_context().gcs_address)


def explain_lost(error: BaseException) -> ResourceError | None:
    """What to tell when Ray's connection broke rather than user code: the cluster's head is gone, or the way to it."""
    import ray

    if not isinstance(error, ConnectionError) or error.__cause__ is not None or ray.is_initialized():
        return None
    return ResourceError(
        f"The Ray cluster can no longer be reached ({error}), and training has ended with it. When it is up again, "
        f"fit(..., ckpt_path='last') goes on from the latest checkpoint that this driver has written."
    )


def nodes_alive() -> set[str]:
    """The ids of the nodes of the Ray in use."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes_gone() -> str:
    """What to say, and to do, where no node of the Ray in use is left."""
    import ray

    lost = sorted({node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]})
    return (
        f"the Ray in use has lost its node(s), {', '.join(lost)}: the machine, or Ray's raylet "
        f"process there, has ended (killed for its memory?). Call ray.shutdown(), and then fit(..., ckpt_path='last') "
        f"goes on from the latest checkpoint that this driver has written."
    )


def free_resources(name: str) -> float:
    """How much of "CPU" or "GPU" nobody in the cluster holds."""
    import ray

    return float(ray.available_resources().get(name, 0.0))


def may_grow() -> bool:
    """Whether nodes could join, through an autoscaler or a person: not where this very process has started Ray."""
    return not started_here()


def started_here() -> bool:
    """Whether the Ray in use was started by this very process."""
    return ray_private.started_by_this_process()


def resources_text() -> str:
    """What the cluster has and what of it is free, for error messages."""
    import ray

    total: dict[str, Any] = ray.cluster_resources()
    free: dict[str, Any] = ray.available_resources()
    parts = [f"{name} {free.get(name, 0):g} of {total[name]:g} free" for name in ("CPU", "GPU") if name in total]
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return f"{', '.join(parts) or 'no CPU'} on {nodes} node(s)"
