"""What a checkpoint may hold: values that are read back without executing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.errors import CheckpointError

__all__ = ["plain_value"]


def plain_value(value: Any, where: str) -> Any:
    """The value in types that can be read back without executing anything.

    Raises:
        CheckpointError: There is no such form; `where` names it.
    """
    if value is None or isinstance(value, (bool, torch.dtype, torch.device)):
        return value
    exact: tuple[Any, ...] = (int, float, complex, bytes)
    for kind in exact:
        if isinstance(value, kind):  # NumPy's float64 is a float, and an IntEnum's member an int: store what they are
            return value if type(value) is kind else kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {plain_value(key, where): plain_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = [plain_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else set(items) if isinstance(value, set) else tuple(items)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return torch.as_tensor(value) if getattr(value, "ndim", 0) else value.tolist()
    raise CheckpointError(
        f"checkpoint entry {where} is a {type(value).__name__}: store numbers, strings, tensors, and lists, tuples, "
        f"dicts or sets of them."
    )
