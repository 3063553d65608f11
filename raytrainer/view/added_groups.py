"""Parameter groups that are added to an optimizer while its schedulers run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raytrainer.view.scheduler_config import SchedulerConfig

__all__ = ["cover_groups"]

#: What schedulers keep for each parameter group: in the group itself, and in lists of their own.
_GROUP_RATES, _GROUP_VALUES = ("initial_lr", "max_lr", "min_lr"), ("base_momentum", "max_momentum", "swa_lr")
_RATE_LISTS, _VALUE_LISTS = ("base_lrs", "max_lrs"), ("lr_lambdas", "base_momentums", "max_momentums", "min_lrs")
_LISTS = (*_RATE_LISTS, *_VALUE_LISTS)


def cover_groups(configs: Sequence[SchedulerConfig]) -> None:
    """Have schedulers also drive parameter groups that were added after these were made.

    An added group goes along with the first one: as far above or below it as now, in the same rhythm. Call it before
    schedulers step, as groups may be added anywhere.
    """
    for config in configs:
        _cover(config.scheduler)


def _cover(scheduler: Any) -> None:
    for part in getattr(scheduler, "_schedulers", ()):
        _cover(part)
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
    if not groups or not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        return
    own = scheduler.__dict__
    known = next((len(values) for name in ("base_lrs", "min_lrs") if isinstance(values := own.get(name), list)), 0)
    if not 0 < known < len(groups):
        return  # nearly always
    # one of another length has something else in it: a user's scheduler may call phases so
    lists = [(name, v) for name in _LISTS if isinstance(v := own.get(name), list) and len(v) == known]
    first = groups[0]
    for group in groups[known:]:
        share = float(group["lr"]) / float(first["lr"]) if first["lr"] else 1.0
        for key in _GROUP_RATES:
            if key in first:
                group.setdefault(key, first[key] * share)
        for key in _GROUP_VALUES:
            if key in first:
                group.setdefault(key, first[key])
        for name, values in lists:
            values.append(values[0] * share if name in _RATE_LISTS else values[0])
