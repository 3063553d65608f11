"""Gradients that manual optimization has left, averaged over workers: dense and sparse, of any dtype."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer.strategies.meeting import BACKWARD, Meeting

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
            _average_sparse(parameter, meeting)
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


def _average_sparse(parameter: nn.Parameter, meeting: Meeting) -> None:
    """Gather every worker's rows, padded to the longest, and add them up."""
    gradient = parameter.grad
    own = torch.zeros(2, dtype=torch.int64)  # entries, and dimensions that they are indexed by
    if gradient is not None:
        gradient = parameter.grad = gradient.coalesce()
        own[0], own[1] = gradient.indices().shape[1], gradient.sparse_dim()
    sizes = torch.zeros(meeting.world_size, 2, dtype=torch.int64)
    dist.all_gather(list(sizes.unbind()), own, group=meeting.group)
    counts, dims = sizes[:, 0].tolist(), int(sizes[:, 1].max())
    most = max(counts)
    if gradient is None:
        indices = torch.empty((0, dims), dtype=torch.int64, device=parameter.device)
        values = parameter.new_empty((0, *parameter.shape[dims:]))
    else:
        indices, values = gradient.indices().T, gradient.values()
    if most:
        indices, values = _gathered(indices, counts), _gathered(values, counts)
    average = torch.sparse_coo_tensor(indices.T, values / meeting.world_size, parameter.shape, check_invariants=False)
    parameter.grad = average.coalesce()


def _gathered(part: Tensor, counts: list[int]) -> Tensor:
    """Every worker's entries, one after another."""
    missing = part.new_zeros((max(counts) - part.shape[0], *part.shape[1:]))
    padded = torch.cat([part, missing])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
