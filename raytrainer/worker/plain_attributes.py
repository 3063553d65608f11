"""A module's plain attributes (counters, histories), which training may have changed and which come home."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytrainer.data.transfer import map_leaves, to_cpu

__all__ = ["plain_attributes"]

#: attributes of torch's, and ours, that are no user data
_INTERNAL = frozenset(torch.nn.Module().__dict__) | {"_view", "_device", "_hparams", "_hparams_initial", "_toggled"}


def plain_attributes(module: Any) -> dict[str, Any]:
    """The module's plain attributes (counters, histories), which training may have changed."""
    found = {k: v for k, v in module.__dict__.items() if k not in _INTERNAL and _plain(v)}
    return {name: map_leaves(value, to_cpu) for name, value in found.items()}


def _plain(value: Any, depth: int = 4) -> bool:
    """Whether `value` is data rather than machinery: numbers, strings, tensors, and containers of them."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)):
        return True
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return all(_plain(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return all(_plain(item, depth - 1) for pair in value.items() for item in pair)
    return False
