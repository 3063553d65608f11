"""Sparse tensors in parts that are dense, and that can be copied, packed and compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sparse", "of_known_kind", "put_together", "taken_apart"]

_BY_ROWS, _BY_COLUMNS = ("sparse_csr", "sparse_bsr"), ("sparse_csc", "sparse_bsc")


def is_sparse(tensor: Tensor) -> bool:
    """Whether `taken_apart` knows its layout."""
    return _layout(tensor) in ("sparse_coo", *_BY_ROWS, *_BY_COLUMNS)


def of_known_kind(tensor: Tensor) -> bool:
    """Whether it is a plain one, dense or sparse, and so can be copied by its content."""
    dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return type(tensor) is Tensor and (dense or is_sparse(tensor))


def taken_apart(tensor: Tensor) -> tuple[str, bool, tuple[int, ...], list[Tensor]]:
    """Its layout, whether each place is there once at most, its shape, and its parts, which share its memory."""
    tensor = tensor.detach()
    layout, shape = _layout(tensor), tuple(tensor.shape)
    if layout == "sparse_coo":
        return layout, tensor.is_coalesced(), shape, [tensor._indices(), tensor._values()]
    if layout in _BY_ROWS:
        return layout, True, shape, [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return layout, True, shape, [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def put_together(parts: Any) -> Tensor:
    """The reverse; what is no such tuple is a tensor, and left as it is."""
    if isinstance(parts, Tensor):
        return parts
    layout, once, shape, tensors = parts
    if layout == "sparse_coo":
        places, values = tensors
        return torch.sparse_coo_tensor(places, values, shape, is_coalesced=once)
    ends, places, values = tensors
    return torch.sparse_compressed_tensor(ends, places, values, shape, layout=getattr(torch, layout))


def _layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix("torch.")
