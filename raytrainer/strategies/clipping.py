"""Clipping gradients that this process has all of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["clip_whole_gradients"]


def clip_whole_gradients(parameters: Iterable[Tensor], value: float, algorithm: str) -> None:
    """Clip gradients by their total norm ("norm") or each ("value"). Sparse ones are summed by row first."""
    parameters = list(parameters)
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        _clip_values(_stored_values(parameters), value, algorithm)
    elif algorithm == "value" and any(p.grad is not None for p in parameters):  # without any, torch's fails
        nn.utils.clip_grad_value_(parameters, value)
    elif algorithm != "value":
        nn.utils.clip_grad_norm_(parameters, value)


def _stored_values(parameters: list[Tensor]) -> list[Tensor]:
    """The memory in which each gradient's numbers are, those of a row in one place."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            parameter.grad = gradient = gradient.coalesce()
            found.append(gradient.values())
        elif gradient is not None:
            found.append(gradient)
    return found


@torch.no_grad()
def _clip_values(values: list[Tensor], value: float, algorithm: str) -> None:
    """As torch's own functions, which take no sparse gradient."""
    if algorithm == "value":
        for part in values:
            part.clamp_(-value, value)
        return
    total = nn.utils.get_total_norm([part for part in values if part.numel()])
    factor = torch.clamp(value / (total + 1e-6), max=1.0)
    for part in values:
        part.mul_(factor.to(part.device))
