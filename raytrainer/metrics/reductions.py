"""How the workers' values of one name become one: without rounding, means by the number of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raytrainer.metric_messages import MetricSpec, Number, Partial
from raytrainer.metrics.exact_numbers import exact

__all__ = ["reduce_partials", "reduce_steps"]


def reduce_partials(reduce: str, partials: Sequence[Partial]) -> Number:
    """One value from all workers' shares: means are weighted by the number of samples."""
    if reduce == "custom":
        return _applied(partials[0].fx, [value for partial in partials for value in partial.values])
    totals = [partial.total for partial in partials]
    if reduce == "sum":
        return exact(sum(totals))
    if reduce in ("min", "max"):
        return exact((min if reduce == "min" else max)(totals))
    weight = sum(partial.weight for partial in partials)
    return sum(totals) / weight if weight else float("nan")


def reduce_steps(spec: MetricSpec, values: Sequence[Number], fx: Callable[[Tensor], Any] | None = None) -> Number:
    """One step value from those of all workers, rank 0's first, as `reduce_fx` says; without `sync_dist` rank 0's."""
    if not spec.sync_dist or len(values) == 1:
        return exact(values[0])
    if spec.reduce == "custom" and fx is not None:
        return _applied(fx, values)
    if spec.reduce == "sum":
        return exact(sum(values))
    if spec.reduce in ("min", "max"):
        return exact((min if spec.reduce == "min" else max)(values))
    return sum(values) / len(values)


def _applied(fx: Callable[[Tensor], Any], values: Sequence[Number]) -> Number:
    result = fx(torch.tensor(values, dtype=torch.float64))
    return exact(result.item() if isinstance(result, Tensor) else result)
