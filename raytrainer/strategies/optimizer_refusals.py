"""Optimizers that cannot work on parameters in shards, told before training."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raytrainer.errors import ConfigurationError

__all__ = ["refuse_optimizer"]

#: What torch's own do that torch cannot do with shards, by name, as older versions of torch lack some.
_NOT_IN_SHARDS = {
    "LBFGS": "joins all parameters to one vector",
    "Adafactor": "takes means over rows and columns in place",
    "Muon": "orthogonalises whole matrices in place",
    "Rprop": "picks single numbers by their signs in place",
}


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Refuse one that torch would fail with in its first step.

    Raises:
        ConfigurationError: Says what to use.
    """
    name = type(optimizer).__name__
    for own, what in _NOT_IN_SHARDS.items():
        if isinstance(optimizer, getattr(torch.optim, own, ())):
            raise ConfigurationError(
                f'{name} with fsdp: it {what}, which torch cannot do with shards; use strategy="ddp", or an optimizer '
                f"that updates number by number, such as AdamW."
            )
    for group in optimizer.param_groups:
        kinds = {p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]}
        fast = [option for option in ("foreach", "fused") if group.get(option)]
        if fast and len(kinds) > 1:
            raise ConfigurationError(
                f"{name}({fast[0]}=True) with parameters on several device meshes in one group (layers that "
                f"are split, and others), or with whole ones (ignored_params): torch cannot update them together; "
                f"give them in separate parameter groups, or leave {fast[0]} out."
            )
