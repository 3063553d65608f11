"""Moving nested batches to a device, and changing their floating-point type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["cast_floating", "first_batch_size", "map_leaves", "move", "to_cpu"]


def map_leaves(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    """`leaf` of everything in `batch` that is no container; containers are rebuilt with their own types.

    Containers are mappings, lists, tuples, named tuples and dataclass instances.
    """
    if isinstance(batch, Tensor):
        return leaf(batch)
    if isinstance(batch, Mapping):
        items = {key: map_leaves(value, leaf) for key, value in batch.items()}
        if hasattr(batch, "to"):  # transformers' BatchEncoding and its like move themselves
            return leaf(batch)
        kind: Any = type(batch)
        return items if kind is dict else kind(items)
    if isinstance(batch, tuple) and not hasattr(batch, "to"):  # torch's PackedSequence is one that moves itself
        values = [map_leaves(value, leaf) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    if isinstance(batch, list):
        return [map_leaves(value, leaf) for value in batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type) and not hasattr(batch, "to"):
        changes = {f.name: map_leaves(getattr(batch, f.name), leaf) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **changes)
    return leaf(batch)


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
    """Floating-point tensors of any nesting as `dtype`; everything else as it is."""
    return map_leaves(batch, lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v)


def first_batch_size(batch: Any) -> int:
    """The first dimension of the first tensor found in `batch`; 1 where there is none."""
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    children: Any = ()
    if isinstance(batch, Mapping):
        children = batch.values()
    elif isinstance(batch, (list, tuple)):
        children = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        children = (getattr(batch, f.name) for f in dataclasses.fields(batch))
    for child in children:
        if isinstance(child, (Tensor, Mapping, list, tuple)) or dataclasses.is_dataclass(child):
            size = first_batch_size(child)
            if size != 1 or isinstance(child, Tensor):
                return size
    return 1


def to_cpu(value: Any) -> Any:
    """Tensors of any nesting, detached and in main memory, each with storage of its own size."""
    return map_leaves(value, lambda v: v.detach().cpu().clone() if isinstance(v, Tensor) else v)
