"""Loaders that do not simply read with torch's `__iter__`: those that keep a reader, and those that wrap a loader.

Some subclasses of DataLoader make their reader once, over a sampler that repeats for ever, to spare the start of
processes in each epoch (timm's MultiEpochsDataLoader, Ultralytics' InfiniteDataLoader). Others are no DataLoader but
have one, and read ahead of it, or change its batches. The user's `__iter__` is run in either case; what it reads from
is sharded, seeded and restarted like any other loader.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from raytrainer.data.known_samplers import is_plain_batching
from raytrainer.data.sharding import ShardedBatches
from raytrainer.private.torch_private import is_loader_iterator

__all__ = [
    "StandIn",
    "finite_loader",
    "front_of",
    "inner_loader",
    "kept_readers",
    "loaders_in",
    "part_at",
    "reads_plainly",
    "with_part",
]

#: Wrappers around wrappers, at most.
DEPTH = 3

#: Items of a list or dict to look into at most.
FEW = 64


class StandIn(Iterator[Any]):
    """In the place of a kept reader: reads this epoch's batches.

    Attributes:
        source: Where from.
    """

    source: Iterator[Any] = iter(())

    def __next__(self) -> Any:
        return next(self.source)


def reads_plainly(loader: Any) -> bool:
    """Whether a loader gives what torch's or torchdata's `__iter__` gives, batch by batch and none ahead of it."""
    if not isinstance(loader, DataLoader):
        return False
    reader = type(loader).__iter__
    return reader is DataLoader.__iter__ or reader.__module__.startswith("torchdata.")


def kept_readers(loader: Any) -> list[str]:
    """Names of attributes in which a loader keeps a reader of torch's, other than the one that torch keeps there."""
    found = getattr(loader, "__dict__", {})
    return [name for name, value in found.items() if name != "_iterator" and is_loader_iterator(value)]


def finite_loader(loader: DataLoader[Any]) -> DataLoader[Any] | None:
    """Torch's own loader over the samplers below the one that repeats for ever; None: there is no telling which.

    Args:
        loader: One that keeps a reader.
    """
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    outer: Any = getattr(loader, name)
    finite = outer if is_plain_batching(outer) else _only_sampler(outer)
    try:
        if finite is None or len(finite) != len(loader):
            return None
    except (TypeError, NotImplementedError):
        return None
    plain = copy.copy(loader)
    for reader in kept_readers(loader):
        del plain.__dict__[reader]
    plain.__class__ = DataLoader
    plain.__dict__ |= {name: finite, "persistent_workers": loader.num_workers > 0, "_iterator": None}
    return plain


def front_of(loader: DataLoader[Any], batches: ShardedBatches, stand_in: StandIn) -> DataLoader[Any]:
    """A copy of a loader that keeps a reader: its `__iter__` reads from `stand_in`, its length is that of `batches`."""
    front = copy.copy(loader)
    for reader in kept_readers(loader):
        front.__dict__[reader] = stand_in
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    outer: Any = getattr(loader, name)
    if is_plain_batching(outer):
        front.__dict__[name] = batches
        return front
    repeated = copy.copy(outer)
    finite = _only_sampler(outer)
    repeated.__dict__ |= {key: batches for key, value in vars(outer).items() if value is finite}
    front.__dict__[name] = repeated
    return front


def _only_sampler(outer: Any) -> Any:
    found = [value for value in getattr(outer, "__dict__", {}).values() if isinstance(value, Sampler)]
    return found[0] if len(found) == 1 else None


def inner_loader(wrapper: Any) -> tuple[str, ...] | None:
    """The way, by attributes, from an iterable that is no DataLoader to the only one in it; None: none, or several."""
    if isinstance(wrapper, (DataLoader, list, tuple, dict)) or not hasattr(wrapper, "__dict__"):
        return None
    ways: list[tuple[str, ...]] = []
    level: list[tuple[tuple[str, ...], Any]] = [((), wrapper)]
    for _ in range(DEPTH):
        deeper = []
        for way, part in level:
            for name, value in vars(part).items():
                if isinstance(value, DataLoader):
                    ways.append((*way, name))
                elif hasattr(value, "__dict__") and hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
                    deeper.append(((*way, name), value))
        level = deeper
    return ways[0] if len(ways) == 1 else None


def loaders_in(thing: Any, depth: int = DEPTH) -> list[DataLoader[Any]]:
    """DataLoaders that an iterable holds, also in lists and dicts."""
    found: list[DataLoader[Any]] = []
    for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
        items = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        )
        for item in items[:FEW]:
            if isinstance(item, DataLoader):
                found.append(item)
            elif (
                depth > 1
                and hasattr(item, "__dict__")
                and hasattr(item, "__iter__")
                and not hasattr(item, "__getitem__")
            ):
                found += loaders_in(item, depth - 1)
    return found


def part_at(wrapper: Any, way: tuple[str, ...]) -> Any:
    """What `inner_loader` found."""
    for name in way:
        wrapper = vars(wrapper)[name]
    return wrapper


def with_part(wrapper: Any, way: tuple[str, ...], part: Any) -> Any:
    """A copy of the wrapper, and of wrappers inside it, with another loader."""
    copied = copy.copy(wrapper)
    name, *rest = way
    copied.__dict__[name] = with_part(vars(wrapper)[name], tuple(rest), part) if rest else part
    return copied
