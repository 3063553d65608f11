"""What a user's samplers and streams carry from epoch to epoch: generators, counters, states of their own.

A run that resumes has new objects, which begin where they were made. So generators are seeded anew in each epoch, and
the rest is part of checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from raytrainer.checkpointing.restored_values import unpack_hyperparameters
from raytrainer.checkpointing.typed_values import NoForm, pack
from raytrainer.data import changed_collections
from raytrainer.data.changed_collections import copied, differ, is_collection, restored, stored
from raytrainer.data.held_objects import STREAMS, held, library_of
from raytrainer.data.own_generators import FOREIGN, is_generator, reseed
from raytrainer.data.transfer import attributes_of
from raytrainer.errors import CheckpointError
from raytrainer.plan.seeds import derive_seed

__all__ = [
    "Memory",
    "begins_otherwise",
    "depends_on_epoch",
    "from_store",
    "has_generators",
    "has_state",
    "recall",
    "remembered",
    "seed_own_generators",
    "tell_all",
    "tell_epoch",
    "to_store",
]

#: What objects remembered, by the way from the root: changed counters and collections (".inner.epoch"), and states
#: (".inner()").
Memory = dict[str, Any]

#: What an attribute that counts is.
COUNTERS = (type(None), bool, int, float, str)

#: What neither is a sampler nor holds one.
NO_PARTS = (Dataset, DataLoader, torch.Tensor, nn.Module, type, ModuleType)


def has_state(thing: Any) -> bool:
    """Whether `thing` has the usual `state_dict()`, without arguments, and `load_state_dict(state)`."""
    if isinstance(thing, (nn.Module, type)) or not callable(getattr(thing, "load_state_dict", None)):
        return False
    method = getattr(thing, "state_dict", None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):  # litdata's and mosaicml's datasets want to be told how far a loader has read
        return False
    return True


def to_store(state: Any, owner: Any) -> Any:
    """A copy of what a `state_dict` gave, as a checkpoint can have it.

    Raises:
        CheckpointError: It holds something that cannot be stored.
    """
    try:
        return pack(copy.deepcopy(state))
    except NoForm as error:
        raise CheckpointError(
            f"the state of {type(owner).__name__} holds a {error}, which a checkpoint cannot have: numbers, strings, "
            f"tensors, arrays, and lists, tuples and dicts of them can be stored."
        ) from None


def from_store(stored: Any, owner: Any) -> Any:
    """The reverse of `to_store`: a copy, so that nobody changes the checkpoint's."""
    return copy.deepcopy(unpack_hyperparameters({"state": stored}, (type(owner),))["state"])


def tell_epoch(sampler: Any, epoch: int) -> None:
    """Call `set_epoch` of a sampler, and of all samplers inside it."""
    tell_all((part for _, part in _parts(sampler)), epoch)


def tell_all(owners: Iterable[Any], epoch: int) -> None:
    """Call `set_epoch` of each that has one, once; the next owner is asked for when the one before has been told."""
    told = dict[int, Any]()
    for owner in owners:
        set_epoch = getattr(owner, "set_epoch", None)
        if callable(set_epoch) and not isinstance(owner, type) and id(owner) not in told:
            told[id(owner)] = owner
            set_epoch(epoch)


def depends_on_epoch(sampler: Any) -> bool:
    """Whether a sampler, or one inside it, is told the epoch."""
    return any(callable(getattr(part, "set_epoch", None)) for _, part in _parts(sampler))


def begins_otherwise(dataset: Any) -> bool:
    """Whether a stream may begin an epoch otherwise in a process that goes on than in a new one.

    It keeps something, or its `__iter__` runs, and may draw an order, before the first sample is asked for, with which
    an epoch's seed comes.
    """
    at_once = not inspect.isgeneratorfunction(getattr(type(dataset), "__iter__", None))
    return has_state(dataset) or has_generators(dataset) or at_once


def has_generators(root: Any) -> bool:
    """Whether `seed_own_generators` would find any."""
    return any(is_generator(part) for _, part in _parts(root))


def seed_own_generators(sampler: Any, seed: int) -> None:
    """Seed every generator (torch's, NumPy's, Python's) that a sampler, or one inside it, has as an attribute."""
    for path, part in _parts(sampler):
        if is_generator(part):
            reseed(part, derive_seed(seed, "generator", path))


def remembered(root: Any, beginning: Memory | None = None) -> Memory:
    """Counters (plain numbers, texts and the like) and collections of `root` and of samplers in it; states of samplers.

    Args:
        root: A sampler, or what gives batches or samples, whose own state would be a position. Of a DataLoader: what
            it has itself.
        beginning: What this gave when it was new. What is as it was then is left out.
    """
    found: Memory = {}
    for path, part in _parts(root, deep=not isinstance(root, DataLoader)):
        if _keeps_itself(path, part):
            with contextlib.suppress(CheckpointError):  # it cannot be kept
                found[f"{path}()"] = to_store(part.state_dict(), part)
            continue
        for name, value in _values(root, path, part).items():
            if beginning is None:
                found[name] = copied(value) if is_collection(value) else value
            elif name not in beginning or differ(beginning[name], value):
                form = stored(value, beginning.get(name)) if is_collection(value) else value
                if form is not None or value is None:
                    found[name] = form
    if beginning is None:
        return found
    return {key: value for key, value in found.items() if not key.endswith("()") or differ(beginning.get(key), value)}


def recall(root: Any, memory: Memory) -> None:
    """Put back what `remembered` gave."""
    for path, part in list(_parts(root, deep=not isinstance(root, DataLoader))):
        if f"{path}()" in memory and _keeps_itself(path, part):
            part.load_state_dict(from_store(memory[f"{path}()"], part))
        for name, value in memory.items():
            owner, _, attribute = name.rpartition(".")
            if owner != path or name.endswith("()"):
                continue
            made = getattr(part, attribute, None)
            with contextlib.suppress(AttributeError):  # it has no place for what another class had
                object.__setattr__(part, attribute, restored(value, made) if isinstance(value, dict) else value)


def _keeps_itself(path: str, part: Any) -> bool:
    return (bool(path) or isinstance(part, Sampler)) and has_state(part)


def _values(root: Any, path: str, part: Any) -> Memory:
    """Attributes, by the way to them, that may count, or hold an order."""
    helps = isinstance(part, Sampler) or hasattr(part, "__iter__") or library_of(part) == library_of(root)
    if path and not helps:
        return {}
    found = {f"{path}.{name}": value for name, value in attributes_of(part).items()}
    # what gives samples itself may have all of its data in lists
    most = changed_collections.MOST if isinstance(root, Sampler) else changed_collections.FEW
    return {name: value for name, value in found.items() if type(value) in COUNTERS or is_collection(value, most)}


def _parts(root: Any, deep: bool = True) -> Iterator[tuple[str, Any]]:
    """(way to it, object): the root, and the samplers, generators and helpers that it holds, but no data."""
    return held(root, _is_part, deep)


def _is_part(value: Any) -> bool:
    if isinstance(value, Sampler) or is_generator(value):
        return True
    kind = type(value)
    if isinstance(value, NO_PARTS) or hasattr(kind, "__next__") or callable(value):
        return False
    return (
        library_of(value) not in (*FOREIGN, *STREAMS)
        and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
        and not hasattr(kind, "__getitem__")
    )
