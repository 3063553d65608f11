"""Tensors as NumPy arrays for the journey: Ray then copies them once into shared memory, and reads them in place."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy

__all__ = ["pack", "unpack"]


@dataclass(frozen=True)
class _Packed:
    """A tensor's bytes, and what they mean. NumPy has no bfloat16, hence bytes."""

    data: numpy.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tree: Any) -> Any:
    """Dicts, lists and tuples with each CPU tensor in them packed, sharing its memory; everything else as it is."""
    if isinstance(tree, Tensor):
        flat = tree.detach().contiguous().view(-1)
        return _Packed(flat.view(torch.uint8).numpy(), tree.dtype, tuple(tree.shape))
    if type(tree) is tuple:
        return tuple(pack(item) for item in tree)
    if type(tree) is list:
        return [pack(item) for item in tree]
    if isinstance(tree, dict):
        return {key: pack(value) for key, value in tree.items()}
    return tree


def unpack(tree: Any) -> Any:
    """The reverse of `pack`. Tensors share the packed bytes, which may be read-only: copy before writing."""
    if isinstance(tree, _Packed):
        return _tensor(tree)
    if type(tree) is tuple:
        return tuple(unpack(item) for item in tree)
    if type(tree) is list:
        return [unpack(item) for item in tree]
    if isinstance(tree, dict):
        return {key: unpack(value) for key, value in tree.items()}
    return tree


def _tensor(packed: _Packed) -> Tensor:
    if not packed.data.size:
        return torch.empty(packed.shape, dtype=packed.dtype)
    with warnings.catch_warnings():
        # that the buffer is read-only is said in unpack's docstring
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(packed.data, dtype=packed.dtype).view(packed.shape)
