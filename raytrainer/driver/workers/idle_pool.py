"""Idle worker groups, kept for the next run that asks for the same resources.

They end after a while, or as soon as others wait for what they hold (`resources.somebody_waits`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from raytrainer.driver.cluster.placement_rules import Request
from raytrainer.driver.cluster.resources import free_by_node, somebody_waits
from raytrainer.driver.cluster.session import own_reservation
from raytrainer.errors import ResourceError
from raytrainer.signals import shield

__all__ = ["IdleGroup", "close_idle", "kept", "put_back", "set_idle_timeout", "take", "tell_none", "when_none_idle"]

log = logging.getLogger("raytrainer")


class IdleGroup(Protocol):
    """A group between runs.

    Attributes:
        broken: Whether it has been aborted.
    """

    broken: bool

    @property
    def request(self) -> Any:
        """The resources that it was made for."""

    @property
    def usable(self) -> bool:
        """Whether a new run may use it."""

    @property
    def holds(self) -> set[str]:
        """Kinds of resource that others could have if it ended."""

    def abort(self) -> None:
        """End it."""


G = TypeVar("G", bound=IdleGroup)

#: Seconds between looks at whether somebody waits for what idle groups hold.
LOOK_EVERY = 1.0

#: Seconds that somebody has to have waited before they give way: a task that will soon be served waits a little too.
GIVE_WAY = 5.0

#: The same while a run that will take one of them reads its datasets, with tasks that wait for each other.
GIVE_WAY_TO_OWN = 30.0

#: Seconds that a new group beside idle ones gets to find the room that Ray has told of.
BRIEFLY = 3.0

_changed = threading.Condition()
_idle: list[tuple[IdleGroup, float]] = []  # with the time until which it is kept, newest last
_watcher: threading.Thread | None = None
_timeout = 300.0
_forgetters: list[Callable[[], None]] = []
_keeping = 0


def set_idle_timeout(seconds: float) -> None:
    """Seconds that an unused group lives; 0 releases it at the end of each run, infinity never."""
    global _timeout
    _timeout = seconds


def take(requests: Sequence[Request], timeout: float, make: Callable[[Request, float], G]) -> G:
    """An idle group with the first of these resources, or a new one with the first that can be had.

    Groups that idle with other resources stay where there is room for the new one beside them. To be called within a
    `shield`, with what keeps the answer.

    Args:
        requests: What would do, best first.
        timeout: Seconds to wait for the best; later ones get a few seconds each.
        make: Makes a new group, of resources that are to be had within so many seconds.

    Raises:
        ResourceError: None can be had.
    """
    group: G | None = _take_idle(requests[0])
    if group is not None:
        return group
    if _idle and _room_beside(requests[0]):
        try:
            return make(requests[0], min(timeout, BRIEFLY))
        except ResourceError as error:  # Ray tells late of what others have taken
            log.debug("Idle workers have to go after all", exc_info=error)
    # what idles may hold the very resources that are asked for
    close_idle()
    for request in requests[:-1]:
        try:
            return make(request, timeout)
        except ResourceError as error:
            log.warning("%s Trying with less.", error)
            timeout = min(timeout, 3.0)
    return make(requests[-1], timeout)


def _take_idle(request: Request) -> Any:
    while True:
        with _changed:
            group = next((group for group, _ in reversed(_idle) if group.request == request), None)
            if group is None:
                return None
            _remove([group])
        if group.usable:
            return group


def _room_beside(request: Request) -> bool:
    """Whether Ray tells of room for a group beside those that idle, and of a CPU more, for tasks that read its data."""
    # chosen GPUs may be those that idle groups hold, and in a reservation of our own Ray does not tell who holds what
    if request.indices or request.free or own_reservation() is not None:
        return False
    try:
        cpus, gpus = free_by_node("CPU"), free_by_node("GPU") if request.gpu else {}
    except Exception as error:
        log.debug("Ray does not tell what is free", exc_info=error)
        return False
    needed = request.cpus * request.per_node
    able = [
        n for n, free in cpus.items() if free >= needed and (not request.gpu or gpus.get(n, 0.0) >= request.per_node)
    ]
    return len(able) >= request.nodes and sum(cpus.values()) >= needed * request.nodes + 1


def _remove(groups: Sequence[IdleGroup]) -> None:
    _idle[:] = [entry for entry in _idle if entry[0] not in groups]
    _changed.notify_all()


def put_back(group: IdleGroup) -> None:
    """Keep a group whose run is over, until the idle time is over or others wait for what it holds."""
    global _watcher
    if group.broken:
        tell_none()
        return
    if _timeout <= 0:
        group.abort()
        tell_none()
        return
    with shield(), _changed:
        _idle.append((group, time.monotonic() + _timeout))
        _changed.notify_all()
        if _watcher is None:
            watcher = threading.Thread(target=_watch, name="raytrainer-idle", daemon=True)
            watcher.start()
            _watcher = watcher


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, idle groups wait longer before they give way: a run that will take one of them reads its datasets."""
    global _keeping
    with _changed:
        _keeping += 1
    try:
        yield
    finally:
        with _changed:
            _keeping -= 1


def _watch() -> None:
    """As long as there are idle groups: release each when its time is over, and all when others wait for them."""
    global _watcher
    since: float | None = None  # others wait
    while True:
        with _changed:
            if _idle:
                _changed.wait(min(LOOK_EVERY, max(0.0, min(until for _, until in _idle) - time.monotonic())))
            if not _idle:
                _watcher = None
                return
            now = time.monotonic()
            over = [group for group, until in _idle if until <= now]
            _remove(over)
            seen = [group for group, _ in _idle]
            patience = GIVE_WAY_TO_OWN if _keeping else GIVE_WAY
        held = {kind for group in seen for kind in group.holds}
        _end(over)
        since = (since or now) if held and somebody_waits(held) else None
        if since is not None and now - since >= patience:
            kinds = " and ".join(sorted(held))
            log.info("Workers that were kept for the next run give way: others wait for their %s.", kinds)
            _release(seen)


def _release(groups: Sequence[IdleGroup]) -> None:
    """End those of these groups that are idle still."""
    with _changed:
        idle = [group for group, _ in _idle if group in groups]
        _remove(idle)
    _end(idle)


def close_idle() -> None:
    """Release every idle group now."""
    with shield():
        with _changed:
            groups = [group for group, _ in _idle]
        _release(groups)


def _end(groups: Sequence[IdleGroup]) -> None:
    for group in groups:
        try:
            group.abort()
        except Exception as error:  # e.g. Ray ends just now; the others are to end all the same
            log.debug("Idle workers could not be ended", exc_info=error)
    if groups:
        tell_none()


def when_none_idle(forget: Callable[[], None]) -> None:
    """Have `forget` called whenever the last idle group has ended: what is kept for the next run goes with it."""
    if forget not in _forgetters:
        _forgetters.append(forget)


def tell_none() -> None:
    """See `when_none_idle`; also to be called where something has been kept for the next run."""
    with _changed:
        gone = not _idle
    for forget in _forgetters if gone else ():
        forget()


atexit.register(close_idle)
