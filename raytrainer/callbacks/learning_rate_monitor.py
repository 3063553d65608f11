"""Log the learning rates that the optimizers use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks._without_logger import warn_without_logger
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["LearningRateMonitor", "group_names"]

Named = list[tuple["Optimizer", list[str], str | None]]


class LearningRateMonitor(WorkerCallback):
    """Logs each optimizer's learning rate, under `lr-Adam`, or `lr-Adam/pg1`, ... with several parameter groups.

    A second optimizer of the same class is `lr-Adam-1`. A scheduler's `name` takes the place of `lr-Adam`, a parameter
    group's "name" that of `pg1`.

    Args:
        logging_interval: "step", "epoch", or None: as often as the scheduler steps (per step without one).
        log_momentum: Also log `...-momentum` (the first of `betas` for optimizers of the Adam kind).
        log_weight_decay: Also log `...-weight_decay`.

    Raises:
        ConfigurationError: Another `logging_interval`, or two parameter groups of one optimizer with the same name.
    """

    def __init__(
        self,
        logging_interval: str | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigurationError(
                f"LearningRateMonitor(logging_interval={logging_interval!r}): allowed are 'step', 'epoch' and None"
            )
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self._named: Named = []

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Say so if there is no logger."""
        warn_without_logger("LearningRateMonitor", trainer, "rates are only in trainer.callback_metrics")

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        """Name every parameter group."""
        self._named = group_names(trainer.optimizers, trainer.lr_scheduler_configs)

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Log what is logged per epoch."""
        for name, value in self._values(trainer, "epoch"):
            module.log(name, value, on_step=False, on_epoch=True, prog_bar=False, logger=True, batch_size=1)

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        """Log what is logged per step."""
        if batch_idx == 0:  # SWA may have taken the schedulers' place as the epoch began
            self._named = group_names(trainer.optimizers, trainer.lr_scheduler_configs)
        for name, value in self._values(trainer, "step"):
            module.log(name, value, on_step=True, on_epoch=False, prog_bar=False, logger=True, batch_size=1)

    def _values(self, trainer: TrainerView, interval: str) -> Iterator[tuple[str, Any]]:
        if any(len(names) != len(optimizer.param_groups) for optimizer, names, _ in self._named):
            self._named = group_names(trainer.optimizers, trainer.lr_scheduler_configs)  # groups have been added
        for optimizer, names, scheduled in self._named:
            if (self.logging_interval or scheduled or "step") != interval:
                continue
            for name, group in zip(names, optimizer.param_groups, strict=True):
                yield name, group["lr"]
                if self.log_momentum:
                    yield f"{name}-momentum", group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
                if self.log_weight_decay:
                    yield f"{name}-weight_decay", group.get("weight_decay", 0.0)


def group_names(optimizers: Sequence[Optimizer], scheduler_configs: Sequence[Any]) -> Named:
    """Every optimizer once, with the names of its parameter groups and its scheduler's interval (None without one).

    Optimizers with a scheduler come first, in the schedulers' order, and so get the lower numbers.
    """
    found: Named = []
    seen: set[int] = set()
    count: Counter[str] = Counter()
    for config in scheduler_configs:
        optimizer = config.scheduler.optimizer
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            found.append((optimizer, _names(optimizer, config.name, count), config.interval))
    for optimizer in optimizers:
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            found.append((optimizer, _names(optimizer, None, count), None))
    return found


def _names(optimizer: Optimizer, given: str | None, count: Counter[str]) -> list[str]:
    base = given or f"lr-{type(optimizer).__name__}"
    count[base] += 1
    if count[base] > 1:
        base = f"{base}-{count[base] - 1}"
    groups = optimizer.param_groups
    labels = [str(group.get("name", f"pg{index}")) for index, group in enumerate(groups, start=1)]
    repeated = sorted(label for label, times in Counter(labels).items() if times > 1)
    if repeated:
        raise ConfigurationError(
            f"LearningRateMonitor: {base} has parameter groups of the same name: {', '.join(repeated)}; "
            "give each group another 'name'"
        )
    if len(groups) == 1 and "name" not in groups[0]:
        return [base]
    return [f"{base}/{label}" for label in labels]
