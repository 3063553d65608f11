"""`torchmetrics.Metric` objects that a module logs: their states go to rank 0, which computes; then all begin anew.

A value is computed before the last hooks of an epoch, which are to see it; hooks may go on to update the object, ask
it for its value over all workers themselves, or reset it, so computing leaves it as it was.

The package is never imported here: where the user has not, nothing can be such an object. A metric may hold others
(wrappers do), so its state is that of all metrics in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from raytrainer.data.transfer import map_leaves
from raytrainer.errors import MetricError

__all__ = [
    "compute",
    "count_once",
    "is_metric",
    "load_states",
    "metrics_in",
    "path_of",
    "reset",
    "states_of",
    "step_value",
    "updates_of",
]

States = dict[str, dict[str, Any]]

#: Where `torchmetrics.wrappers.Running` counts its updates, instead of where all others do; no state of it.
_SEEN = "_num_vals_seen"


def is_metric(value: Any) -> bool:
    """Whether it is a `torchmetrics.Metric`."""
    package = sys.modules.get("torchmetrics")
    return package is not None and isinstance(value, package.Metric)


def metrics_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and object of every metric in a module, itself included."""
    if "torchmetrics" in sys.modules:
        yield from ((name, part) for name, part in module.named_modules() if is_metric(part))


def count_once(metric: Any, alike: int) -> None:
    """Have its value, where user code asks for it, count once what several workers have.

    Args:
        metric: Of a module.
        alike: How many workers with neighbouring ranks see the same batches.
    """
    if alike > 1 and metric.dist_sync_fn is None and metric.process_group is None:
        metric.dist_sync_fn = partial(_of_each, alike=alike)


def _of_each(tensor: Tensor, group: Any = None, alike: int = 1) -> list[Tensor]:
    from torchmetrics.utilities.distributed import gather_all_tensors

    found: list[Tensor] = gather_all_tensors(tensor, group)
    return found[::alike]


def path_of(metric: Any, module: nn.Module, name: str) -> str:
    """By which attributes the module has it.

    Raises:
        MetricError: It has not.
    """
    for path, part in module.named_modules():
        if part is metric:
            return str(path)
    raise MetricError(
        f"self.log({name!r}, <{type(metric).__name__}>): this metric is no attribute of the module; set it in "
        f"__init__, so that it moves to the device and is the same one on every worker."
    )


def step_value(metric: Any, name: str) -> Any:
    """What its latest `forward` has returned.

    Raises:
        MetricError: It was not called, only updated.
    """
    value = metric._forward_cache
    if value is None:
        raise MetricError(
            f"self.log({name!r}, <{type(metric).__name__}>, on_step=True): it has no value of this step; "
            f"call it, as in self.acc(preds, target), instead of update(), or log with on_step=False, on_epoch=True."
        )
    return value


def states_of(metric: nn.Module) -> States:
    """States, and numbers of updates, of all metrics in it that have been updated; in main memory."""
    states = {}
    for name, part in metrics_in(metric):
        count = _updates(part)
        if count:
            keys = [*part._defaults, *([_SEEN] if hasattr(part, _SEEN) else [])]
            values = {key: map_leaves(getattr(part, key), _to_cpu) for key in keys}
            states[name] = {"count": count, "values": values}
    return states


def updates_of(metric: Any) -> int:
    """How many updates it, and all metrics in it, have had since their beginning."""
    return sum(_updates(part) for _, part in metrics_in(metric))


def _updates(part: Any) -> int:
    count: int = getattr(part, _SEEN, part._update_count)
    return count


def load_states(metric: nn.Module, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the metrics in it where `states_of` found them; those that it does not have, at their beginning."""
    reset(metric)
    for name, part in metrics_in(metric):
        if name in states:
            _set(part, states[name]["values"], states[name]["count"])


def reset(metric: Any) -> None:
    """Bring it, and all metrics in it, to their beginning."""
    for _, part in metrics_in(metric):
        for key, default in part._defaults.items():
            if isinstance(default, list):
                setattr(part, key, [])  # its own reset expects a list, where a reduction may have made a tensor
        part.reset()


@torch.no_grad()
def compute(metric: Any, by_worker: Sequence[States], name: str) -> float:
    """Its value over all workers; it stays as it is.

    Args:
        metric: This worker's object. Where no other worker has states, it computes as it is, so that also what it keeps
            outside of its states counts; otherwise these are left out.
        by_worker: `states_of` it, of every worker, this one first.
        name: Under which it is logged.

    Raises:
        MetricError: The value is no scalar; or states of several workers cannot become one.
    """
    parts = list(metrics_in(metric))
    merges = any(by_worker[1:])
    as_it_was = [(part, dict(vars(part))) for _, part in parts]
    try:
        if merges:
            _refuse_windows(metric, name)
            reset(metric)
            for path, part in parts:
                _merge(part, [states[path] for states in by_worker if path in states])
        for _, part in parts:
            part._to_sync = False  # torchmetrics would gather from all workers
        value = metric.compute()
    finally:
        for part, attributes in as_it_was:
            if merges or distributed.is_initialized():  # it remembers no value that others do not
                vars(part).clear()
                vars(part).update(attributes)
            else:
                part._to_sync = part.sync_on_compute
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)):
        return float(value)
    shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise MetricError(
        f"self.log({name!r}, <{type(metric).__name__}>): its value is {shape}; log metrics with one number, and call "
        f"compute() in on_*_epoch_end for others."
    )


def _refuse_windows(metric: Any, name: str) -> None:
    for _, part in metrics_in(metric):
        if hasattr(part, _SEEN):
            raise MetricError(
                f"self.log({name!r}, <{type(metric).__name__}>) with several workers: a running window of each "
                f"worker's own batches does not become one over all. Log it with rank_zero_only=True for rank 0's, "
                f"or log {type(part.base_metric).__name__} itself."
            )


def _merge(part: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """One state of all workers', as the metric's reductions say."""
    if not saved:
        return
    counts = [item["count"] for item in saved]
    merged = {}
    for key, reduce in part._reductions.items():
        values = [item["values"][key] for item in saved]
        if isinstance(part._defaults[key], list):
            values = [v for value in values for v in (value if isinstance(value, list) else [value])]
            joins = reduce is None or getattr(reduce, "__name__", "") == "dim_zero_cat"
            merged[key] = values if joins or not values else reduce(values)
        elif getattr(reduce, "__name__", "") == "dim_zero_mean":
            # workers' means count by their batches, as torchmetrics weights those of one
            merged[key] = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
        else:
            if len({value.shape for value in values}) > 1:
                # of some releases' metrics what has seen nothing has another shape
                values = [value for value, count in zip(values, counts, strict=True) if count]
            stacked = torch.stack(values)
            merged[key] = stacked if reduce is None else reduce(stacked)
    _set(part, merged, sum(counts))


def _set(part: Any, values: Mapping[str, Any], count: int) -> None:
    for key, value in values.items():
        setattr(part, key, map_leaves(value, lambda v: v.to(part.device, copy=True) if isinstance(v, Tensor) else v))
    part._update_count, part._computed = count, None


def _to_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
