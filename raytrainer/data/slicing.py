"""Cutting a batch of any nesting into the slices of several workers, and joining what they made of them.

Containers are mappings, lists, tuples, named tuples and dataclass instances; they keep their types. A *column* is a
list or tuple that holds plain values only (strings, numbers), such as the file names of the samples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import DataError

__all__ = ["cut_batch", "join_parts", "rows_of", "span_of", "unjoinable"]

_PLAIN = (str, bytes, int, float, complex, bool)


def span_of(size: int, index: int, count: int) -> tuple[int, int]:
    """Begin and end of part `index` of `count` of `size` samples; the first `size % count` parts have one more."""
    each, more = divmod(size, count)
    begin = index * each + min(index, more)
    return begin, begin + each + (index < more)


def rows_of(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor (or array) in it, or its number of graphs (PyTorch
    Geometric); else the first column's length.

    Raises:
        DataError: There is neither.
    """
    rows = _first(batch, lambda value: _is_array(value) or _is_graphs(value))
    if rows is None:
        rows = _first(batch, _is_column)
    if rows is None:
        raise DataError(
            f"a batch of type {type(batch).__name__} holds no tensor with a batch dimension, so it cannot be split "
            f'over the workers of a node; let the loader collate tensors, or use strategy="ddp".'
        )
    return rows


def cut_batch(batch: Any, begin: int, end: int, rows: int) -> Any:
    """Samples `begin` to `end` of a batch of `rows`.

    Tensors and arrays are cut along their first dimension, columns of length `rows` likewise, and PyTorch Geometric's
    batches by graphs. Tensors without dimensions and everything else are passed whole.

    Raises:
        DataError: A tensor has another first dimension than `rows`, or an object knows how to move to a device (`.to`)
            and is no container: nobody could say which part of it belongs to which sample.
    """
    if _is_array(batch):
        if batch.shape[0] != rows:
            raise DataError(
                f"a batch of {rows} samples holds a tensor of shape {tuple(batch.shape)}: to be split over the workers "
                f"of a node, each tensor needs one row per sample (or no dimension). Collate it so, keep what belongs "
                f'to no sample in the module, or use strategy="ddp".'
            )
        return batch[begin:end]
    if _is_graphs(batch):
        if batch.num_graphs != rows:
            raise DataError(f"a batch of {rows} samples holds {batch.num_graphs} graphs.")
        graphs = batch.to_data_list()
        return _batch_of(batch, graphs[begin:end] or graphs[:1])  # there is no batch of none; nobody takes a step on it
    if _is_column(batch):
        return batch[begin:end] if len(batch) == rows else batch
    children = _children(batch)
    if children is not None:
        return _rebuilt(batch, {key: cut_batch(value, begin, end, rows) for key, value in children.items()})
    if hasattr(batch, "to") and not isinstance(batch, Tensor):
        raise DataError(
            f"a batch holds a {type(batch).__name__}, which cannot be split over the workers of a node; hand over "
            f'tensors, and build it in training_step, or use strategy="ddp".'
        )
    return batch


def join_parts(parts: Sequence[Any]) -> Any:
    """One output of what several workers returned for their slices, in order.

    Tensors are concatenated along their first dimension; those without dimensions, and numbers, are stacked to a tensor
    with one element per worker; columns, batches of graphs, and objects that torch.cat takes (TensorDict), are
    concatenated. Of anything else there is a list with each worker's.

    Raises:
        DataError: The workers' outputs differ in structure, or hold an object with tensors of which one cannot be made.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        kinds = sorted({type(part).__name__ for part in parts})
        raise DataError(f"workers of a node returned outputs of different types: {', '.join(kinds)}.")
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(parts)) if first.ndim == 0 else torch.cat(list(parts))
    if _is_array(first) and hasattr(first, "__array_interface__"):
        import numpy

        masked = any(isinstance(part, numpy.ma.MaskedArray) for part in parts)
        return (numpy.ma if masked else numpy).concatenate(list(parts))
    if hasattr(type(first), "__torch_function__"):  # TensorDict, say
        return torch.cat(list(parts))
    if isinstance(first, (bool, int, float, complex)):
        return torch.tensor(list(parts))
    if _is_graphs(first):
        return _batch_of(first, [graph for part in parts for graph in part.to_data_list()])
    if all(_is_column(part) for part in parts):
        return type(first)(item for part in parts for item in part)
    all_children = [_children(part) for part in parts]
    children = all_children[0]
    if children is None:
        if hasattr(first, "to"):
            raise DataError(unjoinable(first))
        return list(parts)
    if any(other is None or list(other) != list(children) for other in all_children):
        keys = " / ".join(str(list(other or ())) for other in all_children)
        raise DataError(f"workers of a node returned outputs of different structure: {keys}.")
    return _rebuilt(first, {key: join_parts([other[key] for other in all_children if other]) for key in children})


def unjoinable(value: Any) -> str:
    """What to say of an output with tensors in it that are out of reach."""
    return (
        f"a step returned a {type(value).__name__}. Of what the workers of a node return for their slices, one output "
        f"is made, and no gradients would reach the tensors in this. Return tensors, or a dict, list or dataclass of "
        f'them, or use strategy="ddp".'
    )


def _is_array(value: Any) -> bool:
    """A tensor, or an array such as NumPy's, with at least one dimension."""
    return isinstance(getattr(value, "shape", None), tuple) and len(value.shape) > 0


def _is_graphs(value: Any) -> bool:
    """A batch of PyTorch Geometric's, whose tensors have a row for each node or edge."""
    return isinstance(getattr(value, "num_graphs", None), int) and callable(getattr(value, "to_data_list", None))


def _batch_of(like: Any, graphs: Sequence[Any]) -> Any:
    kind: Any = next(base for base in type(like).__mro__ if callable(vars(base).get("to_data_list")))
    return kind.from_data_list(graphs)


def _is_column(value: Any) -> bool:
    plain_sequence = isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and not hasattr(value, "to")
    return plain_sequence and all(isinstance(item, _PLAIN) for item in value)


def _children(value: Any) -> dict[Any, Any] | None:
    """The items of a container by key, field or index; None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "to"):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return None


def _rebuilt(container: Any, children: dict[Any, Any]) -> Any:
    """A container of the same type with other children."""
    kind: Any = type(container)
    if isinstance(container, Mapping):
        try:
            return children if kind is dict else kind(children)
        except TypeError:
            if not isinstance(container, dict):
                raise
            copied = copy.copy(container)  # one that is made of something else: a defaultdict
            copied.clear()
            copied.update(children)
            return copied
    if isinstance(container, (list, tuple)):
        return kind(*children.values()) if hasattr(container, "_fields") else kind(children.values())
    return dataclasses.replace(container, **children)


def _first(value: Any, wanted: Any) -> int | None:
    """Length of the first thing in `value`, depth first, that is `wanted`."""
    if wanted(value):
        return int(value.num_graphs) if _is_graphs(value) else int(value.shape[0]) if _is_array(value) else len(value)
    children = _children(value)
    for child in (children or {}).values():
        found = _first(child, wanted)
        if found is not None:
            return found
    return None
