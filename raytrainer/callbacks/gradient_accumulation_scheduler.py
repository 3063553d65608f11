"""Change the number of batches per step from epoch to epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from raytrainer.callbacks.callback import Callback
from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.settings import Settings

__all__ = ["GradientAccumulationScheduler", "with_accumulation"]


class GradientAccumulationScheduler(Callback):
    """Accumulates gradients over a number of batches that depends on the epoch.

    `{4: 2, 8: 4}` is one batch per step in epochs 0 to 3, two in 4 to 7, and four from 8 on.

    Args:
        scheduling: Batches per step, by the epoch (from 0) from which on they hold.

    Raises:
        ConfigurationError: Not such a mapping.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not isinstance(scheduling, Mapping) or not scheduling:
            raise ConfigurationError(
                f"GradientAccumulationScheduler({scheduling!r}): give batches per step by epoch, as {{0: 1, 4: 2}}."
            )
        for epoch, batches in scheduling.items():
            checks.count("GradientAccumulationScheduler: epoch", epoch, least=0)
            checks.count(f"GradientAccumulationScheduler: batches per step from epoch {epoch} on", batches, least=1)
        self.scheduling = dict(sorted(scheduling.items()))


def with_accumulation(settings: Settings, callbacks: Iterable[Any]) -> Settings:
    """The settings with what such a callback, if there is one, says.

    Raises:
        ConfigurationError: The trainer has been given another number, too.
    """
    found = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    if found and settings.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"accumulate_grad_batches={settings.accumulate_grad_batches} and a GradientAccumulationScheduler: give one."
        )
    return replace(settings, accumulation=tuple(found[0].scheduling.items()) if found else ())
