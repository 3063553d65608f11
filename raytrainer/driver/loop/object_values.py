"""`ObjectValues`: what metric objects (of torchmetrics) say over all workers, at one end of an epoch or evaluation."""

from __future__ import annotations

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.metric_messages import Number
from raytrainer.metrics.metric_board import Updates
from raytrainer.worker.worker import Worker

__all__ = ["ObjectValues"]


class ObjectValues:
    """Computed before the last hooks, which are to see them, and once more only where a hook has updated an object."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._updates: dict[str, tuple[Number, ...]] = {}
        self._values: dict[str, float] = {}

    def so_far(self, updates: Updates) -> dict[str, float]:
        """Values of these objects, before the last hooks."""
        return self._ask(updates, epoch_ended=False)

    def at_end(self, updates: Updates, epoch_ended: bool = False) -> dict[str, float]:
        """Values of these objects after the last hooks; if a training epoch has ended, they begin anew."""
        changed = {spec: counts for spec, counts in updates.items() if self._is_news(spec.name, counts)}
        return self._ask(changed, epoch_ended and bool(updates))

    def _is_news(self, name: str, counts: tuple[Number, ...]) -> bool:
        """Whether an object has been updated; one that a hook has only reset keeps the value it had before."""
        return name not in self._values or (counts != self._updates[name] and any(counts))

    def _ask(self, updates: Updates, epoch_ended: bool) -> dict[str, float]:
        if updates or epoch_ended:
            self._values |= self._group.call(Worker.compute_metrics, list(updates), epoch_ended)[0]
            self._updates |= {spec.name: counts for spec, counts in updates.items()}
        return self._values
