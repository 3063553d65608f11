"""A number for what is in a tensor, by which workers compare what they hold without sending it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fingerprints"]

#: Numbers that are added up together; each place among them has a weight of its own.
_COLUMNS = 4099
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """One 64-bit number for each tensor, of all its bits. Reads it once, and needs no memory of its size.

    Tensors that differ have different ones, but for changes that cancel out in a sum of weighted integers: one pair in
    about four billion that differ at random.
    """
    if not tensors:
        return []
    found = [_fingerprint(tensor) for tensor in tensors]
    if len({number.device for number in found}) > 1:
        found = [number.cpu() for number in found]
    numbers: list[int] = torch.stack(found).tolist()
    return numbers


def _fingerprint(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    weights = torch.arange(1, 2 * _COLUMNS, 2, device=bits.device)  # odd, so that no bit is lost
    rows = bits.numel() // _COLUMNS
    rest = bits[rows * _COLUMNS :]
    number = (rest * weights[: rest.numel()]).sum()
    if rows:
        number = number * 31 + (bits[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64) * weights).sum()
    return number
