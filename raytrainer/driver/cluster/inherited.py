"""What the processes of the Ray in use were started with: environment variables, and `runtime_env`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.private import ray_private

__all__ = ["changed_environment", "compare", "remember", "started_by_us"]

log = logging.getLogger("raytrainer")

#: Variables that are each process's own.
OWN_VARIABLES = (
    "RAY_", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE", "OMP_NUM_", "PYTEST_", "TORCHINDUCTOR_",
)  # fmt: skip


@dataclass(frozen=True)
class _Start:
    session: str  # which Ray
    runtime_env: Mapping[str, Any] | None
    environment: dict[str, str]
    by_us: bool


_start: _Start | None = None


def remember(runtime_env: Mapping[str, Any] | None, by_us: bool = False) -> None:
    """A Ray has been started (`by_us`), or attached to, with this `runtime_env`; or is used for the first time."""
    import ray

    global _start
    session = str(ray.get_runtime_context().gcs_address)
    if _start is None or _start.session != session:
        _start = _Start(session, runtime_env, dict(os.environ), by_us)


def started_by_us() -> bool:
    """Whether the Ray in use, if there is one, was started by this package."""
    import ray

    if _start is None or not _start.by_us or not ray.is_initialized():
        return False
    return _start.session == str(ray.get_runtime_context().gcs_address)


def compare(runtime_env: Mapping[str, Any] | None) -> None:
    """Say so where a `runtime_env` comes too late for the Ray in use."""
    remember(None)
    if runtime_env and _start is not None and runtime_env != _start.runtime_env:
        log.warning(
            "runtime_env=%r has no effect: the Ray in use was initialised without it. Give it to ray.init, or call "
            "ray.shutdown() first.", dict(runtime_env),
        )  # fmt: skip


def changed_environment() -> dict[str, str | None]:
    """Variables that have been set since the Ray of this machine started, whose workers cannot have inherited them.

    None: removed. Nothing for a cluster, whose nodes have variables of their own.
    """
    if _start is None or not ray_private.started_by_this_process():
        return {}
    then, now = _start.environment, dict(os.environ)
    names = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    return {name: now.get(name) for name in sorted(names) if not name.startswith(OWN_VARIABLES)}
