"""Logged numbers keep their digits: what a metric becomes in Python, and as the tensor that users see."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import MetricError
from raytrainer.metric_messages import Number

__all__ = ["as_tensor", "exact", "number", "plain", "scalar"]


def scalar(name: str, value: Tensor) -> Tensor:
    """The one element of a logged tensor.

    Raises:
        MetricError: There are more, or none, or it is no real number.
    """
    if value.is_complex():
        raise MetricError(f"self.log({name!r}, <tensor of {value.dtype}>): log a real number, e.g. its abs().")
    if value.numel() != 1:
        raise MetricError(
            f"self.log({name!r}, <tensor of shape {tuple(value.shape)}>): log one element, e.g. its mean."
        )
    return value.reshape(())


def plain(name: str, value: Tensor) -> Tensor:
    """A logged tensor of a class derived from Tensor, as a tensor; of a DTensor the same on all workers.

    Raises:
        MetricError: Each worker has a part of it only.
    """
    if not hasattr(value, "placements"):
        return value
    if not all(placement.is_replicate() for placement in value.placements):
        raise MetricError(
            f"self.log({name!r}, <DTensor>): each worker has a part of it; log its full_tensor(), which all workers "
            f"must ask for."
        )
    local: Tensor = value.to_local()  # type: ignore[attr-defined]
    return local


def number(name: str, value: Any) -> Number:
    """What was logged and is neither tensor, float nor int, as one of the latter.

    Raises:
        MetricError: It is no number.
    """
    if isinstance(value, (str, bytes, dict, list, tuple)) or not hasattr(value, "__float__"):
        raise MetricError(
            f"self.log({name!r}, {value!r}): log a number or a tensor with one element; use log_dict for a mapping."
        )
    with suppress(AttributeError, TypeError):  # numpy's integers
        return int(value.__index__())
    return float(value)


def exact(value: Number) -> Number:
    """A float, or the int that it was where a float has too few digits for it."""
    if isinstance(value, int):
        try:
            rounded = float(value)
        except OverflowError:
            return value
        return rounded if rounded == value else value
    return float(value)


def as_tensor(value: Number | Any) -> Tensor:
    """A 0-dim tensor: float64, or int64 for an int that float64 would round."""
    number = exact(value)
    whole = isinstance(number, int) and -(2**63) <= number < 2**63
    return torch.tensor(number, dtype=torch.int64 if whole else torch.float64)
