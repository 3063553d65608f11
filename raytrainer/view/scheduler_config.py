"""`SchedulerConfig`: a learning-rate scheduler and when it steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SchedulerConfig"]


@dataclass
class SchedulerConfig:
    """A scheduler and when to step it.

    Attributes:
        scheduler: Anything with a `step` method and a state dict.
        interval: "epoch" or "step" (optimizer steps).
        frequency: Step it every so many epochs or steps.
        monitor: Name of the metric that `scheduler.step(metric)` is given.
        strict: Whether a missing metric is an error rather than a warning.
        name: What `LearningRateMonitor` calls it.
        on_metric: It is stepped with a metric (ReduceLROnPlateau), hence after the metric is known.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    on_metric: bool = False
