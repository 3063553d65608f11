"""Moving nested batches to a device, and changing their floating-point type."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["attributes_of", "cast_floating", "map_leaves", "map_tensors", "move", "to_cpu"]


def map_leaves(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    """`leaf` of everything in `batch` that is no container; containers are rebuilt with their own types.

    Containers are mappings, lists, tuples, named tuples and dataclass instances, unless they have a method `to`: those
    (transformers' BatchEncoding, TensorDict, torch's PackedSequence) move themselves, and are leaves.
    """
    if isinstance(batch, Tensor):
        return leaf(batch)
    if isinstance(batch, list):
        return [map_leaves(value, leaf) for value in batch]
    if isinstance(batch, (Mapping, tuple)) or dataclasses.is_dataclass(batch):
        if isinstance(batch, type) or hasattr(batch, "to"):
            return leaf(batch)
        return _rebuilt(batch, lambda value: map_leaves(value, leaf))
    return leaf(batch)


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, tuple or dataclass instance with `change` of each item; the original is left alone."""
    kind: Any = type(batch)
    if isinstance(batch, tuple):
        values = [change(value) for value in batch]
        return kind(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, Mapping):
        items = {key: change(value) for key, value in batch.items()}
        if kind is dict:
            return items
        if not isinstance(batch, MutableMapping):
            return kind(items)
        copied = copy.copy(batch)  # which keeps what it has besides its items: a default, a tokenizer's offsets
        for key, value in items.items():
            copied[key] = value
        return copied
    # not `dataclasses.replace`, which would run __post_init__ on what it has been run on already
    copied = copy.copy(batch)
    for field in dataclasses.fields(batch):
        if hasattr(batch, field.name):
            object.__setattr__(copied, field.name, change(getattr(batch, field.name)))
    return copied


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object holds, in its `__dict__` and in the slots of its class."""
    found = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                found[name] = getattr(thing, name)
    return found


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every tensor in `batch`, also in objects that move themselves; the original is left alone.

    Objects without a method `to` that are no containers stay as they are.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, type) or not callable(getattr(value, "to", None)):
            return value
        return _inside(value, change)

    return map_leaves(batch, leaf)


def _inside(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of the tensors of an object that moves itself."""
    if isinstance(value, PackedSequence):
        there, back = (
            order if order is None else change(order) for order in (value.sorted_indices, value.unsorted_indices)
        )
        return PackedSequence(change(value.data), value.batch_sizes, there, back)
    apply = getattr(value, "apply", None)
    if callable(apply):  # PyTorch Geometric's data changes itself in this; TensorDict gives another one
        return copy.copy(value).apply(change)
    if isinstance(value, (Mapping, tuple)) or dataclasses.is_dataclass(value):
        return _rebuilt(value, lambda item: map_tensors(item, change))
    changes = {name: map_tensors(item, change) for name, item in attributes_of(value).items()}
    copied = copy.copy(value)
    for name, item in changes.items():
        object.__setattr__(copied, name, item)
    return copied


def move(batch: Any, device: torch.device) -> Any:
    """Move every tensor, and every object with a `.to` method, to `device`."""
    non_blocking = device.type != "cpu"

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=non_blocking)
        to = getattr(value, "to", None)
        if callable(to):
            moved = to(device)
            return value if moved is None else moved  # some containers move in place
        return value

    return map_leaves(batch, leaf)


def cast_floating(batch: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of any nesting, in objects too (see `map_tensors`), as `dtype`; all else as it is."""
    return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_cpu(value: Any) -> Any:
    """Tensors of any nesting, detached and in main memory, each with storage of its own size."""
    return map_tensors(value, lambda tensor: tensor.detach().cpu().clone())
