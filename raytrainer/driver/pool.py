"""Idle worker groups, kept for the next run that asks for the same resources."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytrainer.driver.ray_group import RayGroup, Request

__all__ = ["close_idle", "put_back", "set_idle_timeout", "take"]

_lock = threading.RLock()
_idle: dict[Request, list[tuple[RayGroup, threading.Timer | None]]] = {}
_timeout = 300.0


def set_idle_timeout(seconds: float) -> None:
    """Seconds that an unused group lives; 0 releases it at the end of each run, infinity never."""
    global _timeout
    _timeout = seconds


def take(request: Request) -> RayGroup:
    """An idle group with these resources, or a new one."""
    from raytrainer.driver.ray_group import RayGroup

    while True:
        with _lock:
            groups = _idle.get(request, [])
            if not groups:
                break
            group, timer = groups.pop()
        if timer is not None:
            timer.cancel()
        if group.usable:
            return group
    # what idles may hold the very resources that are asked for
    close_idle()
    return RayGroup(request)


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
