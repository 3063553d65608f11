"""Idle worker groups, kept for the next run that asks for the same resources."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raytrainer.errors import ResourceError

if TYPE_CHECKING:
    from raytrainer.driver.ray_group import RayGroup, Request

__all__ = ["close_idle", "put_back", "set_idle_timeout", "take"]

log = logging.getLogger("raytrainer")

_lock = threading.RLock()
_idle: dict[Request, list[tuple[RayGroup, threading.Timer | None]]] = {}
_timeout = 300.0


def set_idle_timeout(seconds: float) -> None:
    """Seconds that an unused group lives; 0 releases it at the end of each run, infinity never."""
    global _timeout
    _timeout = seconds


def take(requests: Sequence[Request], timeout: float = 60.0) -> RayGroup:
    """An idle group with the first of these resources, or a new one with the first that can be had.

    Args:
        requests: What would do, best first.
        timeout: Seconds to wait for the best; later ones get a few seconds each.

    Raises:
        ResourceError: None can be had.
    """
    from raytrainer.driver.ray_group import RayGroup

    group = _take_idle(requests[0])
    if group is not None:
        return group
    # what idles may hold the very resources that are asked for
    close_idle()
    for request in requests[:-1]:
        try:
            return RayGroup(request, timeout)
        except ResourceError as error:
            log.warning("%s Trying with less.", error)
            timeout = min(timeout, 3.0)
    return RayGroup(requests[-1], timeout)


def _take_idle(request: Request) -> RayGroup | None:
    while True:
        with _lock:
            groups = _idle.get(request, [])
            if not groups:
                return None
            group, timer = groups.pop()
        if timer is not None:
            timer.cancel()
        if group.usable:
            return group


def put_back(group: RayGroup) -> None:
    """Keep a group whose run is over; release it after the idle time."""
    if group.broken:
        return
    if _timeout <= 0:
        group.abort()
        return
    with _lock:
        timer = None
        if _timeout < threading.TIMEOUT_MAX:
            timer = threading.Timer(_timeout, _expire, [group])
            timer.daemon = True
            timer.start()
        _idle.setdefault(group.request, []).append((group, timer))


def _expire(group: RayGroup) -> None:
    with _lock:
        groups = _idle.get(group.request, [])
        kept = [(g, t) for g, t in groups if g is not group]
        if len(kept) == len(groups):
            return  # taken in the meantime
        _idle[group.request] = kept
    group.abort()


def close_idle() -> None:
    """Release every idle group now."""
    with _lock:
        groups = [entry for entries in _idle.values() for entry in entries]
        _idle.clear()
    for group, timer in groups:
        if timer is not None:
            timer.cancel()
        group.abort()


atexit.register(close_idle)
