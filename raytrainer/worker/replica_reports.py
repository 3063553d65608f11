"""What a worker says of the tensors that all workers are to hold alike."""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch

from raytrainer.messages import Difference, Fingerprints
from raytrainer.strategies.fingerprints import fingerprints
from raytrainer.strategies.group_strategy import GroupStrategy
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["difference", "fingerprints_of"]

#: What is to be the same on all workers, as optimizers call it. What else is in their groups may be a worker's own.
_COMPARED = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "betas", "eps", "maximize", "amsgrad")

#: Numbers that are gathered together.
_AT_ONCE = 1 << 22


def fingerprints_of(run: WorkerRun, parameters: bool) -> Fingerprints:
    """See `Worker.fingerprints`."""
    strategy = run.strategy
    if not isinstance(strategy, GroupStrategy):  # nobody else holds anything
        return Fingerprints({}, {}, _settings(run) if parameters else {})
    weights, buffers = strategy.replicas(run.module)
    if not parameters:
        weights = {}
    numbers = fingerprints([*weights.values(), *buffers.values()])
    return Fingerprints(
        dict(zip(weights, numbers, strict=False)),
        dict(zip(buffers, numbers[len(weights) :], strict=True)),
        _settings(run) if parameters else {},
        {name: piece for name, piece in strategy.pieces(run.module).items() if name in weights},
    )


def _settings(run: WorkerRun) -> dict[str, Any]:
    """What the optimizers go by: parameters that are in shards tell nothing of one that differs."""
    optimizers = run.view.optimizers
    found: dict[str, Any] = {}
    for index, optimizer in enumerate(optimizers):
        named = type(optimizer).__name__ + (f" (optimizer {index})" if len(optimizers) > 1 else "")
        for number, group in enumerate(optimizer.param_groups):
            there = (name for name in _COMPARED if name in group)
            found.update({f"{name} of {named}, group {number}": _plain(group[name]) for name in there})
            if run.strategy.device_mesh is not None and (steps := _steps(optimizer, group)):
                found[f"number of steps of {named}, group {number}"] = steps
    return found


def _steps(optimizer: Any, group: dict[str, Any]) -> tuple[float, ...]:
    """How often it has been stepped, as its states have it: more than one number where parameters joined later."""
    counts = [optimizer.state[p]["step"] for p in group["params"] if "step" in optimizer.state.get(p, ())]
    tensors = [count for count in counts if isinstance(count, torch.Tensor) and count.numel() == 1]
    found = {float(count) for count in counts if isinstance(count, (int, float))}
    by_device: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor.detach().reshape(()).to(torch.float64))
    for alike in by_device.values():
        found.update(torch.stack(alike).unique().tolist())
    return tuple(sorted(found))


def _plain(value: Any) -> Any:
    """As numbers and tuples of them, which can be sent and compared, whatever the optimizer keeps."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.item() if value.numel() == 1 else _plain(value.tolist())
    if isinstance(value, (tuple, list)):
        return tuple(_plain(each) for each in value)
    if hasattr(value, "tolist"):  # numpy's
        return _plain(value.tolist())
    return value if isinstance(value, (bool, int, float, complex, str, NoneType)) else type(value).__name__


@torch.no_grad()
def difference(run: WorkerRun, name: str) -> Difference:
    """See `Worker.compare`. All workers must call it together."""
    strategy = run.strategy
    assert isinstance(strategy, GroupStrategy)  # others have no replicas to name
    weights, buffers = strategy.replicas(run.module)
    own = {**weights, **buffers}[name].detach()
    wide = torch.complex128 if own.is_complex() else torch.float64
    largest, scale = [0.0], [0.0]
    for part in own.reshape(-1).split(_AT_ONCE) if own.numel() else ():  # a piece of nothing is so for all that have it
        first = strategy.of_first(run.module, name, part).to(wide)
        largest.append(float((part.to(wide) - first).abs().max()))
        scale.append(float(first.abs().max()))
    exact = not (own.is_floating_point() or own.is_complex())
    return Difference(_largest(largest), _largest(scale), 0.0 if exact else _rounding(own.dtype))


def _largest(parts: list[float]) -> float:
    return float(torch.tensor(parts, dtype=torch.float64).max())


def _rounding(dtype: torch.dtype) -> float:
    """What many steps of rounding come to, in a type that has few digits: a few units in the last place."""
    return torch.finfo(dtype).eps * (4 if dtype.itemsize <= 2 else 256)
