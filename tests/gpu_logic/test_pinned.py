"""Pinned memory out of ordinary one; CUDA's two calls are stood in for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cuda_memory import Cuda

from raytrainer.gpu import pinned
from raytrainer.gpu.pinned import pinned_tensors

CPU = torch.device("cpu")
KINDS = [
    (torch.float32, torch.Size([3, 5])),
    (torch.bfloat16, torch.Size([])),
    (torch.bool, torch.Size([7])),
    (torch.int64, torch.Size([0, 4])),
    (torch.complex64, torch.Size([1000])),
    (torch.float64, torch.Size([2, 1, 3])),
]


def test_tensors_of_all_kinds_lie_beside_each_other_in_memory_that_cuda_knows(cuda: Cuda) -> None:
    tensors = pinned_tensors(KINDS, CPU)
    assert [(t.dtype, t.shape) for t in tensors] == KINDS
    assert len(cuda.known) == 1 and all(cuda.knows(t) for t in tensors if t.numel())
    for index, tensor in enumerate(tensors):
        tensor.fill_(index % 2)
    assert all((t == index % 2).all() for index, t in enumerate(tensors))


def test_pieces_are_small_but_for_tensors_that_are_not(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "PIECE", 4096)
    sizes = [100, 300, 500, 200, 5000, 10, 700]
    tensors = pinned_tensors([(torch.float32, torch.Size([size])) for size in sizes], CPU)
    assert [t.numel() for t in tensors] == sizes and all(map(cuda.knows, tensors))
    assert sorted(cuda.known.values()) == [1024, 512 + 3072, 512 + 1536 + 2048, 20480]


def test_cuda_forgets_memory_with_the_last_that_uses_it(cuda: Cuda) -> None:
    tensors = pinned_tensors(KINDS, CPU)
    part = tensors[4][10:].numpy()
    part[:] = 1.0
    del tensors
    gc.collect()
    assert len(cuda.known) == 1 and (part == 1.0).all()
    del part
    gc.collect()
    assert cuda.known == {} and cuda.there == [True]


def no_mapping(*args: Any, **options: Any) -> Any:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("mapped", [True, False])
def test_where_cuda_or_the_system_refuses_torch_is_asked(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    cuda.refuses = mapped
    if not mapped:
        monkeypatch.setattr(pinned.mmap, "mmap", no_mapping)
    asked = []
    monkeypatch.setattr(torch, "empty", lambda shape, **options: asked.append((shape, options)) or torch.zeros(shape))
    assert len(pinned_tensors(KINDS[:2], CPU)) == 2
    assert asked == [(shape, {"dtype": dtype, "pin_memory": True}) for dtype, shape in KINDS[:2]]
