"""Finding a learning rate: one that rises from step to step, and the loss at each.

It trains a copy of the module: see `short_runs.py`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raytrainer.callbacks.callback import Callback
from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.short_runs import MakeProbe, NoSchedulers, no_trace, run_copy
from raytrainer.driver.prepare.tuned_attribute import get_attribute, set_attribute
from raytrainer.errors import ConfigurationError
from raytrainer.loggers import Logger
from raytrainer.module import Module
from raytrainer.plan.searches import diverged_at, rates, smoothed
from raytrainer.view.learning_rates import LearningRates
from raytrainer.view.trainer_view import TrainerView

__all__ = ["find_learning_rate"]

log = logging.getLogger("raytrainer")

#: Batches without a step that are waited for in any case.
IDLE = 100

_LOSS, _RATE = "lr_find/loss", "lr_find/rate"


class _Sweep(NoSchedulers):
    """Raises the learning rate from step to step, and logs the loss."""

    def __init__(self, lrs: list[float]) -> None:
        self.lrs, self.rate = lrs, lrs[0]
        self.step, self.idle = 0, 0  # as of the latest batch; batches since there has been another
        self.silent = 0  # batches without a loss, before the first one that has one

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        rate = self.rate = self.lrs[min(trainer.global_step, len(self.lrs) - 1)]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.idle = self.idle + 1 if trainer.global_step == self.step else 0
        self.step = trainer.global_step
        if self.idle >= max(len(self.lrs), IDLE):
            raise ConfigurationError(
                f"lr_find: {type(module).__name__} has made no optimizer step in {self.idle} batches: the rate rises "
                f"from step to step. With manual optimization, training_step is to call optimizer.step() more often."
            )
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            self.silent += 1
            if self.silent == len(self.lrs):
                raise _no_loss(module)
            return
        self.silent = -sys.maxsize
        loss = loss * trainer.accumulate_grad_batches  # as training_step has returned it
        module.log(_LOSS, loss, on_step=True, on_epoch=False, sync_dist=True, batch_size=1)
        module.log(_RATE, self.rate, on_step=True, on_epoch=False, batch_size=1)


def _no_loss(module: Module) -> ConfigurationError:
    return ConfigurationError(
        f"lr_find: {type(module).__name__}.training_step returned no loss in any batch; it is needed, also with manual "
        f"optimization."
    )


class _Losses(Logger):
    """Takes the losses, averaged over workers, and the rates that they were had with."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if _LOSS in metrics:
            self.losses.append(metrics[_LOSS])
            self.rates.append(metrics[_RATE])

    def log_hyperparams(self, params: Any) -> None:
        pass


class _StopWhenDiverged(Callback):
    def __init__(self, taken: _Losses, threshold: float | None, first: int) -> None:
        self.taken, self.threshold, self.first = taken, threshold, first

    def on_train_chunk_end(self, trainer: Any, module: Module, report: Any) -> None:
        if diverged_at(smoothed(self.taken.losses), self.threshold, self.first) is not None:
            trainer.should_stop = True


def find_learning_rate(
    make_probe: MakeProbe,
    module: Module,
    loaders: Any,
    datamodule: DataModule | None,
    *,
    min_lr: float,
    max_lr: float,
    num_training: int,
    mode: str,
    early_stop_threshold: float | None,
    attribute: str | None,
) -> LearningRates:
    """See `Trainer.lr_find`."""
    lrs = rates(min_lr, max_lr, num_training, mode)
    if early_stop_threshold is not None and early_stop_threshold <= 1:
        raise ConfigurationError(
            f"lr_find(early_stop_threshold={early_stop_threshold}): give a factor above 1, or None."
        )
    if attribute is not None:
        get_attribute(attribute, module)  # an error now rather than after the search
    taken, first = _Losses(), num_training // 10
    stopping = _StopWhenDiverged(taken, early_stop_threshold, first)
    probe = make_probe([_Sweep(lrs), stopping], [taken], max_steps=num_training)
    with no_trace(loaders):
        run_copy(probe, module, loaders, datamodule)
    if not taken.losses:
        raise _no_loss(module)
    smooth = smoothed(taken.losses)
    end = diverged_at(smooth, early_stop_threshold, first)
    smooth = smooth if end is None else smooth[:end]
    found = LearningRates({"lr": taken.rates[: len(smooth)], "loss": smooth, "raw": taken.losses[: len(smooth)]})
    rate = found.suggestion()
    if rate is None:
        log.warning("lr_find: the loss fell at none of %d learning rates; there is no suggestion.", len(smooth))
    else:
        log.info("lr_find suggests a learning rate of %.3g", rate)
        if attribute is not None:
            set_attribute(attribute, rate, module)
            found.attribute = attribute
    return found
