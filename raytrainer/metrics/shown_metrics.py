"""What module code sees as `self.trainer.callback_metrics`, `logged_metrics` and `progress_bar_metrics`.

As in Lightning: within batches, step values of the batch in progress; outside of them, epoch values so far; otherwise
what was there last. Step values are this worker's own; epoch values are over all workers once the driver has sent them.
Nothing is computed or waited for unless somebody looks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raytrainer.metric_messages import Number, Partial, Reduced
from raytrainer.metrics.device_fetch import begin_fetch
from raytrainer.metrics.exact_numbers import as_tensor, exact
from raytrainer.metrics.metric_objects import compute, updates_of
from raytrainer.metrics.metric_slots import Ledger, Slot
from raytrainer.metrics.reductions import reduce_partials

__all__ = ["ShownMetrics"]


class ShownMetrics:
    """The three mappings of one worker."""

    def __init__(self) -> None:
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.progress: dict[str, Number] = {}

    def clear(self) -> None:
        """Nothing has been logged yet."""
        for shown in (self.callback, self.logged, self.progress):
            shown.clear()

    def take(self, reduced: Reduced) -> None:
        """Take up values over all workers."""
        same = reduced.callback
        for name, value in same.items():
            self.callback[name] = as_tensor(value)
        for name, value in reduced.logged.items():
            self.logged[name] = self.callback[name] if same.get(name) is value else as_tensor(value)
        self.progress.update(reduced.progress)

    def take_steps(self, ledger: Ledger, loader: int | None, training: bool) -> None:
        """Take up the latest step values. Those of evaluations are no callback metrics."""
        for slot in ledger.slots.values():
            if not _belongs(slot, loader):
                continue
            value = slot.shown if slot.last is None else slot.last
            if slot.spec.on_step and value is not None:
                if slot.dtype is not None and not isinstance(value, Tensor):
                    value = torch.tensor(value, dtype=slot.dtype)
                self._show(slot, slot.spec.step_name, value, callback=training)

    def take_epoch(self, ledger: Ledger, loaders: range | None = None) -> None:
        """Take up this worker's epoch values so far (of these loaders), but for those it has over all workers."""
        for slot in ledger.slots.values():
            of_these = loaders is None or any(_belongs(slot, loader) for loader in loaders)
            if of_these and slot.spec.on_epoch and not slot.reduced:
                value = _so_far(slot)
                if value is not None:
                    self._show(slot, slot.spec.epoch_name, value, callback=True)

    def _show(self, slot: Slot, full_name: str, value: Any, callback: bool) -> None:
        tensor = value if isinstance(value, Tensor) else as_tensor(value)
        if callback:
            self.callback[slot.spec.name] = self.callback[full_name] = tensor
        if slot.spec.logger:
            self.logged[full_name] = tensor
        if slot.spec.prog_bar:
            self.progress[full_name] = exact(tensor.item())


def _belongs(slot: Slot, loader: int | None) -> bool:
    return loader in slot.loaders if slot.loaders else slot.spec.loader == loader


@torch.no_grad()
def _so_far(slot: Slot) -> Number | None:
    if slot.metric is not None:
        if not slot.logged or not updates_of(slot.metric):
            return None
        return compute(slot.metric, [{}], slot.spec.name)
    latest = Slot(slot.spec, None, slot.fx)
    latest.folded, latest.custom = list(slot.folded), list(slot.custom)
    if slot.pending:
        latest.fold(begin_fetch(slot.pending)(), slot.weight)
    share: Partial | None = latest.share(True)
    return None if share is None else reduce_partials(slot.spec.reduce, [share])
