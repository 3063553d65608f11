"""Clipping gradients of which each worker holds a shard."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytrainer.strategies.shards import local_part

__all__ = ["clip_shards"]


@torch.no_grad()
def clip_shards(parameters: Iterable[Tensor], value: float, algorithm: str) -> None:
    """Clip by the norm over all shards ("norm"), or each value ("value").

    torch's own function takes parameters that are all laid out alike. Where some are whole, or lie on other workers,
    each kind's norm is taken apart.
    """
    held = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in held if p.grad is not None]
    if algorithm == "value":
        for gradient in gradients:
            local_part(gradient).clamp_(-value, value)
        return
    kinds: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        kinds.setdefault((layout, gradient.device.type), []).append(gradient)
    alike = len(kinds) <= 1 and all(
        not isinstance(g, DTensor) or g.device_mesh.device_type == g.device.type for g in gradients
    )
    if alike:
        nn.utils.clip_grad_norm_(held, value)
        return
    total = torch.stack([_norm(members) for members in kinds.values()]).square().sum().sqrt()
    scale = (value / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = local_part(gradient)
        local.mul_(scale.to(local.device, local.dtype))


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of gradients that are laid out alike, over all workers; in main memory."""
    square = torch.stack(
        [local_part(g).float().norm() if g.dtype.itemsize < 4 else local_part(g).norm() for g in gradients]
    )
    total = square.double().square().sum()
    first = gradients[0]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        total = total.to(mesh.device_type)
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard() or not placement.is_replicate():
                dist.all_reduce(total, group=mesh.get_group(dimension))
    return total.sqrt().cpu()
