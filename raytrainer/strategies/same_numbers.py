"""Whether two tensors have the same numbers, what is no number included; and whether one has been written to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["same_numbers", "version_of"]


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and type, and the same numbers; a NaN is as another one."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # nearly always the first, which takes no memory
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def version_of(tensor: Tensor) -> int:
    """Grows when it is written to."""
    return -1 if tensor.is_inference() else tensor._version
