"""Tensors as NumPy arrays for the journey: Ray then copies them once into shared memory, and reads them in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy

__all__ = ["bytes_of_tensor", "pack", "replaced", "tensor_of_bytes", "unpack", "without_tensors"]


@dataclass(frozen=True)
class _Packed:
    """A tensor's bytes, and what they mean. NumPy has no bfloat16, hence bytes."""

    data: numpy.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(tree: Any) -> Any:
    """Dicts, lists and tuples with each CPU tensor in them packed, sharing its memory; everything else as it is."""
    return replaced(tree, Tensor, _packed)


def unpack(tree: Any) -> Any:
    """The reverse of `pack`. Tensors share the packed bytes, which may be read-only: copy before writing."""
    return replaced(tree, _Packed, _tensor)


def without_tensors(tree: Any) -> Any:
    """The same with None for each tensor."""
    return replaced(tree, Tensor, lambda tensor: None)


def replaced(tree: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """Dicts, lists and tuples with what `change` makes of each object of a `kind` in them."""
    if isinstance(tree, kind):
        return change(tree)
    if type(tree) is tuple:
        return tuple(replaced(item, kind, change) for item in tree)
    if type(tree) is list:
        return [replaced(item, kind, change) for item in tree]
    if isinstance(tree, dict):
        return {key: replaced(value, kind, change) for key, value in tree.items()}
    return tree


def _packed(tensor: Tensor) -> _Packed:
    return _Packed(bytes_of_tensor(tensor), tensor.dtype, tuple(tensor.shape))


def _tensor(packed: _Packed) -> Tensor:
    return tensor_of_bytes(packed.data, packed.dtype, packed.shape)


def bytes_of_tensor(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """A CPU tensor's bytes, sharing its memory where that is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy()  # type: ignore[no-any-return]


def tensor_of_bytes(data: numpy.ndarray[Any, Any] | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The reverse; shares the bytes, which may be read-only: copy before writing."""
    if not data.nbytes:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # that the buffer is read-only is said above
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype).view(shape)
