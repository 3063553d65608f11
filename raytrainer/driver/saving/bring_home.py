"""Bringing results home: the driver's own objects take up what workers have trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytrainer.datamodule import DataModule
from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.messages import FinishReport
from raytrainer.module import Module
from raytrainer.strategies.driver_side import DriverSide
from raytrainer.worker.worker import Worker

__all__ = ["bring_home"]


def bring_home(
    module: Module, datamodule: DataModule | None, report: FinishReport, group: WorkerGroup, side: DriverSide
) -> None:
    """Put weights, buffers, hyperparameters and plain attributes into the driver's module.

    Layers that were built in the workers (in `setup` or `configure_model`) are built here too.
    """
    if group.in_process or report.state_dict is None:
        return
    _take_buffers(module, report)
    if set(report.state_dict) != set(module.state_dict()):
        module.configure_model()
        _take_buffers(module, report)
    if set(report.state_dict) != set(module.state_dict()):
        _graft(group.call(Worker.fetch_module)[0], module)
    side.take_home(module, report.state_dict)
    module.hparams.update(report.hparams or {})
    parts = dict(module.named_modules())
    for path, values in report.attributes.items():
        if path in parts:
            parts[path].__dict__.update(values)
    _take_buffers(module, report)
    if datamodule is not None and report.datamodule_state:
        datamodule.load_state_dict(report.datamodule_state)


def _take_buffers(module: nn.Module, report: FinishReport) -> None:
    """Have the buffers that the workers' module has, as far as the parts that they are of are there."""
    parts = dict(module.named_modules())
    kept = {name: (report.state_dict or {}).get(name) for name in report.kept_buffers}
    for path, value in (*report.buffers.items(), *kept.items()):
        owner, _, name = path.rpartition(".")
        if owner not in parts:
            continue
        part = parts[owner]
        own = part._buffers.get(name)
        if path in kept and own is not None:
            continue  # which the state dict brings
        if own is not None and value is not None and own.shape == value.shape and own.dtype == value.dtype:
            with torch.no_grad():
                own.copy_(value)
        elif name in part._buffers:
            part._buffers[name] = None if value is None else value.clone()
        elif not hasattr(part, name):
            part.register_buffer(name, None if value is None else value.clone(), persistent=path in kept)


def _graft(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the submodules, parameters and buffers that only `source` has."""
    for kind in ("_parameters", "_buffers"):
        ours: dict[str, Any] = getattr(target, kind)
        for name, value in getattr(source, kind).items():
            if ours.get(name) is None:
                ours[name] = value
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set
    for name, child in source._modules.items():
        own = target._modules.get(name)
        if child is None:
            continue
        if own is None:
            target._modules[name] = child
        else:
            _graft(child, own)
