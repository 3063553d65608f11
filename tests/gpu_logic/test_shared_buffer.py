"""Tensors in memory segments; CUDA's two calls are stood in for."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from cuda_memory import Cuda
from torch import Tensor

from raytrainer.gpu import pinned
from raytrainer.gpu.shared_buffer import SharedBuffer
from raytrainer.memory_segments import PIECE, Handed, lay_out
from raytrainer.worker.actor.holder import Holder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has such memory")
GPU = torch.device("cuda", 0)
SIZES = {"a": 400, "large": 2 * PIECE + 4096, "b": 8}


def test_each_tensor_lies_in_memory_that_cuda_knows(cuda: Cuda) -> None:
    buffer = SharedBuffer(lay_out(SIZES), GPU)
    tensors = [buffer.tensor(key, torch.uint8, (size,)) for key, size in SIZES.items()]
    parts = [part for tensor in tensors for part in tensor.split(PIECE)]
    assert len(cuda.known) == 4 and len(parts) == 5 and all(map(cuda.knows, parts))
    assert buffer.tensor("a", torch.float32, (10, 10)).fill_(1.5).sum() == 150
    held = tensors[0]
    buffer.close()
    del buffer, tensors, parts
    gc.collect()
    assert cuda.known and held.view(torch.float32)[0] == 1.5  # until nobody uses it
    del held
    gc.collect()
    assert cuda.known == {} and cuda.there == [True] * 4


def test_what_is_adopted_is_as_it_was_and_known_to_cuda(cuda: Cuda) -> None:
    layout = lay_out(SIZES)
    first = SharedBuffer(layout, GPU)
    first.tensor("large", torch.uint8, (SIZES["large"],)).fill_(7)
    holder = Holder()
    (held,) = holder.hold(0, [1], Handed(first.segment, layout))
    assert held is not None
    first.close()
    del first
    gc.collect()
    second = SharedBuffer(layout, GPU, held)
    assert len(cuda.known) == 4 and (second.tensor("large", torch.uint8, (SIZES["large"],)) == 7).all()
    second.tensor("b", torch.int64, ()).fill_(-3)
    holder.keep([])
    assert bytes(Handed(second.segment, layout).bytes_of("b")()) == (-3).to_bytes(8, "little", signed=True)
    assert second.segment.places != held.places


def test_a_copy_stays_within_what_cuda_knows_as_one(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = SharedBuffer(lay_out(SIZES), GPU)
    data = torch.arange(SIZES["large"] // 8).view(2, -1).t()  # not contiguous
    copy, within = Tensor.copy_, []

    def copied(self: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
        within.append(cuda.knows(self))
        return copy(self, other, non_blocking)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "copy_", copied)
        buffer.copy("large", data)
        buffer.copy("b", torch.tensor(3.0, dtype=torch.float64))
    assert within == [True] * 4
    assert torch.equal(buffer.tensor("large", torch.int64, data.shape), data)
    assert buffer.tensor("b", torch.float64, ()) == 3.0


def test_where_cuda_refuses_copies_go_on(cuda: Cuda, monkeypatch: Any) -> None:
    monkeypatch.setattr(pinned, "register", lambda *arguments: False)
    buffer = SharedBuffer(lay_out(SIZES), GPU)
    assert buffer.tensor("b", torch.int64, ()).fill_(5) == 5
    buffer.close()
    assert cuda.known == {} and cuda.there == []
