from __future__ import annotations

import itertools

import pytest
import torch

from raytrainer.strategies.fingerprints import fingerprints

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn,
)  # fmt: skip


def some(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256 if dtype != torch.bool else 2, (count * size,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 4098, 4099, 4100, 20_000])
def test_every_element_counts(dtype, count):
    tensor = some(count, dtype)
    (number,) = fingerprints([tensor])
    assert fingerprints([tensor.clone()]) == [number]
    size = tensor.element_size()
    for place in {0, count // 2, count - 1}:
        for byte in {0, size - 1}:
            other = tensor.clone()
            other.view(torch.uint8)[place * size + byte] ^= 1
            assert fingerprints([other]) != [number], (place, byte)


@pytest.mark.parametrize("count", [2, 5000, 9000])
def test_order_counts(count):
    tensor = torch.arange(float(count))
    for one, other in itertools.combinations((0, 1, count // 2, count - 1), 2):
        if one != other:
            swapped = tensor.clone()
            swapped[one], swapped[other] = tensor[other], tensor[one]
            assert fingerprints([tensor]) != fingerprints([swapped]), (one, other)


def test_layouts():
    tensor = torch.arange(12.0).reshape(3, 4)
    sparse = torch.eye(3).to_sparse()
    conjugate = torch.view_as_complex(tensor.reshape(6, 2)).conj()
    assert fingerprints([]) == []
    assert fingerprints([tensor.T, sparse, conjugate, torch.empty(0), torch.tensor(2.0)]) == fingerprints(
        [tensor.T.contiguous(), torch.eye(3), conjugate.resolve_conj().clone(), torch.empty(0), torch.tensor(2.0)]
    )
