"""Optimizers and schedulers: what `configure_optimizers` may return."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from raytrainer.errors import ConfigurationError
from raytrainer.view.scheduler_config import SchedulerConfig

__all__ = ["check_parameters", "parse_optimizers"]

log = logging.getLogger("raytrainer")

_SCHEDULER_KEYS = {"scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"}
_FORMS = (
    "an optimizer, a list of optimizers, (optimizers, schedulers), a dict with 'optimizer' and 'lr_scheduler', "
    "a list of such dicts, or None"
)


def parse_optimizers(
    answer: Any, *, manual: bool = False, own_step: bool = False
) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """Every form of `configure_optimizers`' answer, as one.

    Args:
        answer: What it returned.
        manual: `training_step` steps the schedulers itself, so that they need neither a metric nor a `step`.
        own_step: The module's own `lr_scheduler_step` steps them, so that they need no `step`.

    Raises:
        ConfigurationError: Some other form, options of a scheduler that cannot work, or an optimizer that does nothing.
    """
    optimizers, items = _parts(answer)
    for optimizer in optimizers:
        _check_fused(optimizer)
        _with_hooks(optimizer)
    schedulers = [_scheduler(item, manual, steps=not (manual or own_step)) for item in items]
    for config in schedulers:
        of = getattr(config.scheduler, "optimizer", None)
        if isinstance(of, Optimizer) and not any(of is optimizer for optimizer in optimizers):
            raise ConfigurationError(
                f"configure_optimizers returned a {type(config.scheduler).__name__} of a {type(of).__name__} that it "
                f"did not return: it would change the rate of nothing that trains. Return that optimizer too."
            )
    return optimizers, schedulers


def _with_hooks(optimizer: Optimizer) -> None:
    """Have one that wraps another take hooks of its steps, though it has left torch's `__init__` out (opacus does)."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        Optimizer.__setstate__(optimizer, {})  # as for one that comes from a pickle


def _check_fused(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, SGD):
        return
    dtypes = {
        parameter.dtype
        for group in optimizer.param_groups
        if group.get("fused")
        for parameter in group["params"]
        if parameter.device.type == "cpu"
    }
    for dtype in dtypes & {torch.bfloat16, torch.float16}:
        # torch 2.13, for one, updates the last few numbers only: try it
        weights = torch.ones(64, dtype=dtype)
        weights.grad = torch.ones_like(weights)
        SGD([weights], lr=0.5, fused=True).step()
        if (weights == 1).any():
            raise ConfigurationError(
                f"SGD(fused=True) with {dtype} weights on a CPU: torch {torch.__version__} does not update them there. "
                f"Leave fused out."
            )


def _parts(answer: Any) -> tuple[list[Optimizer], list[Any]]:
    """The optimizers, and the schedulers as they were given."""
    if answer is None:
        return [], []
    if isinstance(answer, Optimizer):
        return [answer], []
    if isinstance(answer, Mapping):
        return _from_dicts([answer])
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        items = list(answer)
        if len(items) == 2 and isinstance(items[0], (list, tuple)):
            schedulers = items[1] if isinstance(items[1], (list, tuple)) else [items[1]]
            return _only_optimizers(items[0]), list(schedulers)
        if items and all(isinstance(item, Mapping) for item in items):
            return _from_dicts(items)
        return _only_optimizers(items), []
    if hasattr(answer, "step") and not isinstance(answer, type):
        name = type(answer).__name__
        raise ConfigurationError(f"configure_optimizers returned {name}(...) alone: return ([optimizer], [scheduler]).")
    what = f"{answer.__name__}, a class" if isinstance(answer, type) else repr(answer)
    raise ConfigurationError(f"configure_optimizers returned {what}: return {_FORMS}.")


def _only_optimizers(items: Sequence[Any]) -> list[Optimizer]:
    for item in items:
        if not isinstance(item, Optimizer):
            schedules = hasattr(item, "step") and not isinstance(item, type)
            instead = "([optimizer], [scheduler])" if schedules else _FORMS
            what = f"{type(item).__name__}(...)" if schedules else repr(item)
            raise ConfigurationError(f"configure_optimizers returned {what} as an optimizer: return {instead}.")
    return list(items)


def _from_dicts(items: Sequence[Mapping[str, Any]]) -> tuple[list[Optimizer], list[Any]]:
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    for item in items:
        unknown = set(item) - {"optimizer", "lr_scheduler", "monitor"}
        if unknown or "optimizer" not in item:
            raise ConfigurationError(
                f"configure_optimizers returned a dict with keys {sorted(map(str, item))}: it needs 'optimizer', may "
                f"have 'lr_scheduler' and its 'monitor', and nothing else."
            )
        if not isinstance(item["optimizer"], Optimizer):
            raise ConfigurationError(
                f"configure_optimizers returned {{'optimizer': {item['optimizer']!r}}}: give an optimizer, such as "
                f"torch.optim.Adam(self.parameters())."
            )
        optimizers.append(item["optimizer"])
        scheduler = item.get("lr_scheduler")
        if scheduler is not None:
            if "monitor" in item and not isinstance(scheduler, SchedulerConfig):
                options = scheduler if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
                scheduler = {"monitor": item["monitor"], **options}
            schedulers.append(scheduler)
    return optimizers, schedulers


def _scheduler(item: Any, manual: bool, steps: bool) -> SchedulerConfig:
    if isinstance(item, SchedulerConfig):
        return item
    options = dict(item) if isinstance(item, Mapping) else {"scheduler": item}
    unknown = set(options) - _SCHEDULER_KEYS
    if unknown:
        raise ConfigurationError(
            f"lr_scheduler options {sorted(unknown)} are unknown; there are {sorted(_SCHEDULER_KEYS)}."
        )
    scheduler = options.get("scheduler")
    if isinstance(scheduler, type):
        raise ConfigurationError(
            f"lr_scheduler {scheduler.__name__}, a class: give {scheduler.__name__}(optimizer, ...)."
        )
    if not hasattr(scheduler, "state_dict") or (steps and not hasattr(scheduler, "step")):
        raise ConfigurationError(
            f"lr_scheduler {scheduler!r}: give an object with step() and state_dict(); it needs no step() where the "
            f"module overrides lr_scheduler_step."
        )
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    config = SchedulerConfig(
        scheduler=scheduler,
        interval=options.get("interval", "epoch"),
        frequency=options.get("frequency", 1),
        monitor=options.get("monitor"),
        strict=options.get("strict", True),
        name=options.get("name"),
        on_metric=not manual and options.get("reduce_on_plateau", plateau),
    )
    if config.interval not in ("epoch", "step"):
        raise ConfigurationError(f'lr_scheduler interval={config.interval!r}: give "epoch" or "step".')
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise ConfigurationError(f"lr_scheduler frequency={config.frequency!r}: give an integer of at least 1.")
    if config.on_metric and config.monitor is None:
        raise ConfigurationError(
            f"{type(scheduler).__name__} steps with a metric: return a dict with "
            f'{{"scheduler": ..., "monitor": "<metric name>"}}.'
        )
    return config


def refuse_exchanged(now: Sequence[Optimizer], given: Sequence[Any]) -> None:
    """Raise where a hook has put others into `trainer.optimizers`, which nobody would step.

    Args:
        now: What is there.
        given: What stands for those of `configure_optimizers`, which train.
    """
    kept = [each.optimizer for each in given]
    if len(kept) != len(now) or any(one is not other for one, other in zip(kept, now, strict=True)):
        names = [[type(optimizer).__name__ for optimizer in each] for each in (now, kept)]
        raise ConfigurationError(
            f"trainer.optimizers has been given {names[0]} while training, where configure_optimizers had returned "
            f"{names[1]}: a run keeps its optimizers. Change them (optimizer.add_param_group(...), "
            f"group['lr'] = ...), return all of them in configure_optimizers, or train with others in another fit."
        )


def check_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Warn where there is none, and of one that trains what the module does not hold: another module's parameters."""
    if not optimizers:
        log.warning("configure_optimizers returned None: nothing will be optimised.")
    own = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        strange = sum(id(parameter) not in own for parameter in given)
        if strange:
            log.warning(
                "configure_optimizers: %d of the %d tensors of %s are no parameters of this %s: nothing moves them to "
                "devices, averages their gradients over workers or saves them. Give self.parameters(), or make what "
                "they belong to an attribute of the module.",
                strange, len(given), type(optimizer).__name__, type(module).__name__,
            )  # fmt: skip
