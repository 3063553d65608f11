"""Lists, arrays and the like that samplers change from epoch to epoch: orders shuffled in place, queues, weights."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor

from raytrainer.checkpointing.restored_values import unpack_hyperparameters
from raytrainer.checkpointing.typed_values import NoForm, pack

__all__ = ["FEW", "MOST", "copied", "differ", "is_collection", "restored", "stored"]

#: Items of one that may be kept: a list of more is taken for data.
MOST = 2**24

#: The same of what gives samples itself, and of those that hold more than whole numbers, which take longer.
FEW = 2**17

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (list, tuple, set, deque)}


def is_collection(value: Any, most: int = MOST) -> bool:
    """Whether an order may be kept in it, of `most` items."""
    kind = type(value)
    if kind is Tensor:
        return bool(value.numel() <= most and value.layout is torch.strided and not value.is_nested)
    if kind is dict or kind in _KINDS.values():
        return len(value) <= most
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is numpy.ndarray and value.size <= most and value.dtype.kind in "biuf"


def copied(value: Any) -> Any:
    """A copy, of collections inside too."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(item) if is_collection(item) else item for key, item in value.items()}
    if type(value) in _KINDS.values():
        return type(value)([copied(item) if is_collection(item) else item for item in value])
    return value.copy()


def differ(one: Any, other: Any) -> bool:
    """Whether two values are not the same; those that cannot be compared count as different."""
    if type(one) is not type(other):
        return True
    if isinstance(one, Tensor):
        return not torch.equal(one, other)
    if type(one) is dict:
        return one.keys() != other.keys() or any(differ(value, other[key]) for key, value in one.items())
    if hasattr(one, "dtype"):
        return bool(one.shape != other.shape or (one != other).any())
    try:
        return bool(one != other)
    except (RuntimeError, ValueError):  # tensors and arrays in it, which compare one by one
        if type(one) not in _KINDS.values():
            return True
        return len(one) != len(other) or any(differ(*pair) for pair in zip(one, other, strict=True))


def stored(value: Any, was: Any) -> Any:
    """One in a form that a checkpoint can have; None if there is none.

    Args:
        value: As it is now.
        was: As it was when it was made.
    """
    form = _form(value)
    return None if form is None else {"made with": _size(was), **form}


def _form(value: Any) -> dict[str, Any] | None:
    kind = type(value)
    if kind is Tensor:
        return {"kind": "value", "value": copied(value)}
    if kind in _KINDS.values():
        if _whole(value):
            return {"kind": kind.__name__, "numbers": _numbers(value)}
        inner = {type(item) for item in value}
        if inner in ({list}, {tuple}) and all(map(_whole, value)):  # batches
            flat = _numbers([number for item in value for number in item])
            lengths = torch.tensor([len(item) for item in value])
            return {"kind": kind.__name__, "of": inner.pop().__name__, "numbers": flat, "lengths": lengths}
    if kind is dict:
        items = [(key, _form(item) if is_collection(item) else None) for key, item in value.items()]
        if items and all(form is not None for _, form in items):
            return {"kind": "dict", "keys": pack([key for key, _ in items]), "items": [form for _, form in items]}
    if len(value) > FEW and not hasattr(value, "dtype"):
        return None
    try:
        return {"kind": "value", "value": pack(copied(list(value) if kind is deque else value)), "deque": kind is deque}
    except (NoForm, RecursionError):
        return None


def _whole(value: Any) -> bool:
    return all(type(item) is int and -(2**63) <= item < 2**63 for item in value)


def _numbers(value: Any) -> Tensor:
    return torch.tensor(list(value), dtype=torch.int64)


def _size(value: Any) -> int | None:
    if not is_collection(value):
        return None
    return value.numel() if isinstance(value, Tensor) else len(value)


def restored(form: dict[str, Any], made: Any) -> Any:
    """The reverse of `stored`; `made` itself where that is of another size than what the form began as.

    Args:
        form: What `stored` gave.
        made: What is there in its place, just made.
    """
    if form["made with"] != _size(made):
        return made
    found = _value(form)
    if type(found) is not type(made) or not isinstance(made, (list, deque)):
        return found
    made.clear()  # others may have it too
    made.extend(found)
    return made


def _value(form: dict[str, Any]) -> Any:
    kind = form["kind"]
    if kind == "value":
        value = unpack_hyperparameters({"value": form["value"]})["value"]
        return deque(value) if form.get("deque") else copied(value) if is_collection(value) else value
    if kind == "dict":
        keys = unpack_hyperparameters({"keys": form["keys"]})["keys"]
        return dict(zip(keys, map(_value, form["items"]), strict=True))
    numbers = form["numbers"].tolist()
    if "lengths" not in form:
        return _KINDS[kind](numbers)
    ends = form["lengths"].cumsum(0).tolist()
    inner = _KINDS[form["of"]]
    return _KINDS[kind]([inner(numbers[start:end]) for start, end in zip([0, *ends], ends, strict=False)])
