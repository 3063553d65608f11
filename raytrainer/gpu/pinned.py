"""Main memory that a GPU copies to and from directly, taken beside the GPU's work.

torch's `pin_memory=True` asks CUDA for such memory. While CUDA makes it, 1.4 s for 1.5 GB beside an H100, training in
another thread waits. Ordinary memory, its pages being there, is made known to CUDA in pieces, and no step waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import sys
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raytrainer.memory_segments import ALIGNED, PIECE

__all__ = ["pinned_tensors", "register", "unregister"]

log = logging.getLogger("raytrainer")


def pinned_tensors(kinds: Sequence[tuple[torch.dtype, torch.Size]], device: torch.device) -> list[Tensor]:
    """Uninitialised tensors of these types and shapes, in memory pinned for `device`.

    Call it in a thread of its own: where CUDA refuses memory, it says so once more to whatever runs next in the thread.
    """
    made: list[Tensor] = []
    for piece in _pieces(kinds):
        tensors = _in_one_mapping(piece, device)
        made += tensors or [torch.empty(shape, dtype=dtype, pin_memory=True) for dtype, shape in piece]
    return made


def _pieces(kinds: Sequence[tuple[torch.dtype, torch.Size]]) -> Iterator[list[tuple[torch.dtype, torch.Size]]]:
    piece: list[tuple[torch.dtype, torch.Size]] = []
    held = 0
    for kind in kinds:
        if piece and held + _bytes(*kind) > PIECE:
            yield piece
            piece, held = [], 0
        piece.append(kind)
        held += _bytes(*kind)
    if piece:
        yield piece


def _bytes(dtype: torch.dtype, shape: torch.Size) -> int:
    """What a tensor takes, up to where the next one may begin."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED


def _in_one_mapping(kinds: Sequence[tuple[torch.dtype, torch.Size]], device: torch.device) -> list[Tensor] | None:
    """Tensors beside each other in memory that CUDA knows; None where that cannot be had."""
    if not sys.platform.startswith("linux"):
        return None
    size = sum(_bytes(*kind) for kind in kinds)
    if size == 0:
        return [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # a child's copy would leave the GPU with pages that this process no longer has
        mapping.madvise(mmap.MADV_DONTFORK)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # kernels without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    # The tensors keep `held` alive, and `held` keeps the mapping. CUDA has to forget the memory before it is unmapped,
    # which the end of `held` tells in time; the end of the mapping itself would tell too late.
    held = (ctypes.c_char * size).from_buffer(mapping)
    whole = torch.frombuffer(held, dtype=torch.uint8)
    whole[:: mmap.PAGESIZE].zero_()  # have the pages now: this holds up nobody, and the next call does
    if not register(whole.data_ptr(), size, device):
        return None
    weakref.finalize(held, unregister, whole.data_ptr(), device).atexit = False
    tensors, begin = [], 0
    for dtype, shape in kinds:
        count = math.prod(shape) * dtype.itemsize
        tensors.append(whole[begin : begin + count].view(dtype).view(shape))
        begin += _bytes(dtype, shape)
    return tensors


def register(address: int, size: int, device: torch.device) -> bool:
    """Make memory known to CUDA; whether it takes it."""
    with torch.cuda.device(device):  # a thread's own may be a GPU that is not used
        return int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0


def unregister(address: int, device: torch.device) -> bool:
    """The reverse; whether CUDA has done so."""
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostUnregister(address))
    if error:
        log.warning("CUDA could not unregister pinned memory: error %d.", error)
    return error == 0
