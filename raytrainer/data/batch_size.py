"""How many samples a batch of any kind has: what its share of an epoch's mean is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["batch_size_of", "batch_sizes_in", "first_batch_size"]

#: What objects call their size: PyTorch Geometric's batches, its temporal ones, TensorDict and most others.
_NAMES = ("num_graphs", "num_events", "batch_size")

_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def first_batch_size(batch: Any) -> int:
    """Samples in `batch`; 1 where that cannot be known."""
    size = batch_size_of(batch)
    return 1 if size is None else size


def batch_size_of(batch: Any) -> int | None:
    """Samples in `batch`; None where that cannot be known.

    The first size found, depth first: of an object that tells it (`num_graphs`, `batch_size`, a length that does not
    count keys), else the first dimension of a tensor or array. Tensors without dimensions are passed over. Where there
    is none of these, the length of the first list of equal things, such as file names or images.
    """
    size = next(batch_sizes_in(batch), None)
    return _column_length(batch) if size is None else size


def batch_sizes_in(batch: Any) -> Iterator[int]:
    """The size that each tensor and each object in `batch` speaks for."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.size(0)
        return
    if isinstance(batch, _PLAIN):
        return
    size = _told(batch)
    if size is not None:
        yield size
        return
    children = _children(batch)
    if children is not None:
        for child in children:
            yield from batch_sizes_in(child)
        return
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):  # NumPy's arrays and their like
        if shape and isinstance(shape[0], int):
            yield shape[0]
    elif hasattr(type(batch), "__len__") and not hasattr(batch, "keys"):
        yield len(batch)


def _told(batch: Any) -> int | None:
    """What an object says of its size."""
    if isinstance(batch, (list, dict)) or type(batch) is tuple:
        return None
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    for name in _NAMES:
        size = getattr(batch, name, None)
        if isinstance(size, torch.Size) and size:
            return size[0]
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    # PyTorch Geometric's subgraphs of several kinds of nodes: the kind that was sampled for says how many
    for store in getattr(batch, "node_stores", ()):
        if isinstance(size := getattr(store, "batch_size", None), int):
            return size
    return None


def _children(batch: Any) -> Iterator[Any] | None:
    """What is in a container; None for anything else."""
    if isinstance(batch, Mapping):
        return iter(batch.values())
    if isinstance(batch, (list, tuple)):
        return iter(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return (getattr(batch, field.name, None) for field in dataclasses.fields(batch))
    return None


def _column_length(batch: Any) -> int | None:
    """The length of the first list or tuple, depth first, that holds things of one type and no containers."""
    if isinstance(batch, (list, tuple)) and batch and not hasattr(batch, "_fields"):
        kinds = {type(item) for item in batch}
        if len(kinds) == 1 and not isinstance(batch[0], Tensor) and _children(batch[0]) is None:
            return len(batch)
    for child in _children(batch) or ():
        size = _column_length(child)
        if size is not None:
            return size
    return None
