"""Gradients that manual optimization has left, averaged over workers: dense and sparse, of any dtype."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer.strategies.meeting import BACKWARD, Meeting
from raytrainer.strategies.sparse_averages import averaged

__all__ = ["average_gradients"]

_NONE, _SPARSE, _DENSE = 0, 1, 2


@torch.no_grad()
def average_gradients(module: nn.Module, meeting: Meeting) -> None:
    """Average in one collective per dtype, and one for each sparse gradient.

    Averaging what earlier passes had already averaged leaves it as it is, so several backward passes before a step are
    right too. A gradient that no worker has stays None.

    Raises:
        DisagreementError: Workers are at different calls.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    kinds = bytes(_kind(p.grad) for p in parameters)
    least, most = meeting.meet(BACKWARD, zlib.crc32(kinds))
    if least != most:
        kinds = _of_any(kinds, meeting)
    dense: dict[torch.dtype, list[Tensor]] = {}
    for parameter, kind in zip(parameters, kinds, strict=True):
        if kind == _SPARSE:
            parameter.grad = averaged(parameter.grad, parameter, meeting.group)
        elif kind == _DENSE:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:  # tied to something whose gradient is dense, on another worker
                parameter.grad = parameter.grad.to_dense()
            dense.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in dense.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= meeting.world_size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _kind(gradient: Tensor | None) -> int:
    return _NONE if gradient is None else _SPARSE if gradient.is_sparse else _DENSE


def _of_any(kinds: bytes, meeting: Meeting) -> bytes:
    """For each parameter, what some worker's gradient is; dense before sparse."""
    found = torch.frombuffer(bytearray(kinds), dtype=torch.uint8)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=meeting.group)
    return bytes(found.tolist())
