"""Whether large tensors have been written to since they were seen first, also by what leaves them their version.

Batch normalisation, `.data`, kernels of users' own and arrays that share a tensor's memory do.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from xxhash import xxh3_128_digest

from raytrainer.strategies.same_numbers import version_of
from raytrainer.tensor_packing import bytes_of_tensor
from raytrainer.worker.sparse_parts import is_sparse, taken_apart

__all__ = ["Tables", "Unproven", "digest_there"]

#: Numbers of one on a GPU that are looked into at once, so that it takes little memory.
_AT_ONCE = 2**22

#: Odd, and without a pattern.
_FACTORS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


@dataclass
class Unproven:
    """What a device is to say of tensors that are taken as unchanged.

    Attributes:
        said: A number each, on the device.
        expected: The numbers, if they are unchanged.
    """

    said: Tensor
    expected: list[int]


@dataclass
class _Seen:
    """A tensor as it was."""

    tensor: weakref.ref[Tensor]
    version: int
    digest: bytes | int


class Tables:
    """Remembers tensors, whatever their size: who asks less often reads less.

    Args:
        tensors: They, as they are now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        digests = _here([_digest(tensor) for tensor in tensors])
        self._seen = [
            _Seen(weakref.ref(tensor), version_of(tensor), digest)
            for tensor, digest in zip(tensors, digests, strict=True)
        ]
        self._unproven: list[Unproven] | None = None

    def live(self) -> list[Tensor | None]:
        """The tensors, if they are there still."""
        return [seen.tensor() for seen in self._seen]

    @contextlib.contextmanager
    def proving_later(self) -> Iterator[list[Unproven]]:
        """Within this, `unchanged` does not wait for a device, and the list has what it is still to say."""
        self._unproven = []
        try:
            yield self._unproven
        finally:
            self._unproven = None

    def unchanged(self) -> dict[int, int]:
        """Places of those that nobody has written to, by their ids. Waits for a device once at most."""
        asked = [
            (place, tensor, seen.digest)
            for place, seen in enumerate(self._seen)
            if (tensor := seen.tensor()) is not None and version_of(tensor) == seen.version
        ]
        now = [_digest(tensor) for _, tensor, _ in asked]
        if self._unproven is None:
            same = [digest == before for digest, (_, _, before) in zip(_here(now), asked, strict=True)]
        else:
            for there in _by_device(now):
                expected = [before for index in there if isinstance(before := asked[index][2], int)]
                self._unproven.append(Unproven(torch.stack(list(there.values())), expected))
            same = [isinstance(digest, Tensor) or digest == asked[i][2] for i, digest in enumerate(now)]
        return {id(tensor): place for (place, tensor, _), is_same in zip(asked, same, strict=True) if is_same}


def _digest(tensor: Tensor) -> bytes | Tensor:
    """Another one when it has other content."""
    if tensor.is_meta:
        return b""
    parts = taken_apart(tensor)[3] if is_sparse(tensor) else [tensor]
    if _is_here(tensor):
        return b"".join(xxh3_128_digest(bytes_of_tensor(part).data) for part in parts)
    return torch.stack([digest_there(part) * factor for part, factor in zip(parts, (1, *_FACTORS), strict=False)]).sum()


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _here(digests: Sequence[bytes | Tensor]) -> list[bytes | int]:
    """All of them, those of each device fetched together."""
    found: list[bytes | int] = [0 if isinstance(digest, Tensor) else digest for digest in digests]
    for there in _by_device(digests):
        for index, number in zip(there, torch.stack(list(there.values())).tolist(), strict=True):
            found[index] = number
    return found


def _by_device(digests: Sequence[bytes | Tensor]) -> list[dict[int, Tensor]]:
    """For each device the places of its digests, and these."""
    found: dict[torch.device, dict[int, Tensor]] = {}
    for index, digest in enumerate(digests):
        if isinstance(digest, Tensor):
            found.setdefault(digest.device, {})[index] = digest
    return list(found.values())


@torch.no_grad()
def digest_there(tensor: Tensor) -> Tensor:
    """A number of what is in it, computed where it is, which nobody waits for."""
    data = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    numbers = data.view(torch.int32) if (len(data) | int(data.storage_offset())) % 4 == 0 else data
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(numbers), _AT_ONCE):
        part = numbers[begin : begin + _AT_ONCE].long()
        # each place counts in a way of its own: whole numbers, which wrap around and do not round
        weights = torch.arange(begin + 1, begin + 1 + len(part), device=tensor.device) * _FACTORS[0]
        weights = (weights ^ (weights >> 29)) * _FACTORS[1] | 1
        total += ((part + 1) * (weights ^ (weights >> 32) | 1)).sum()
    return total
