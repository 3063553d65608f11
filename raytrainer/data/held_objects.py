"""What a user's objects hold, and what that holds: each object with the way to it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from raytrainer.data.transfer import attributes_of

__all__ = ["STREAMS", "held", "library_of"]

#: Libraries of streams, which draw their order from seeds and epochs of their own.
STREAMS = ("datasets", "litdata", "streaming", "webdataset", "torchdata")

#: Objects to look into at most: what holds more than that holds data.
MOST = 256

#: Items of a list or dict to look into at most.
FEW = 16

#: Lists in lists, at most.
DEPTH = 3


def library_of(thing: Any) -> str:
    """The package that its class comes from."""
    return type(thing).__module__.split(".")[0]


def held(root: Any, enter: Callable[[Any], bool], deep: bool = True) -> Iterator[tuple[str, Any]]:
    """(way to it, object): the root, and what `enter` says yes to of what is in attributes, and in lists there.

    Args:
        root: Where to begin.
        enter: Asked of each.
        deep: Whether to look further than at the root.
    """
    seen: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", root)])
    while waiting and len(seen) < MOST:
        path, part = waiting.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield path, part
        if not deep:
            return
        for name, value in _attributes(part).items():
            waiting += [(way, item) for way, item in _items(f"{path}.{name}", value, DEPTH) if enter(item)]


def _attributes(part: Any) -> dict[str, Any]:
    if isinstance(part, functools.partial):
        return {"func": part.func, "args": part.args, "keywords": part.keywords}
    if isinstance(part, MethodType):
        return {"__self__": part.__self__}
    return attributes_of(part)


def _items(way: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The value, or what is in it, if that is a short list, tuple or dict."""
    if not depth or not isinstance(value, (list, tuple, dict)):
        yield way, value
    elif len(value) <= FEW:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _items(f"{way}[{key!r}]", item, depth - 1)
