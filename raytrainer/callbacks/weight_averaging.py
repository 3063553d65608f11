"""Validate, save and end with averages of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from raytrainer.callbacks._averaging import AveragedWeights, Many, One, of_all
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["WeightAveraging"]


class WeightAveraging(WorkerCallback):
    """Keeps an average of the weights: the mean of all steps' ones, or what `avg_fn` makes of them.

    The first average is the weights at the first update; override `should_update` to say when there are updates.
    Validations within `fit` run with the averages; afterwards training goes on from its own weights. Checkpoints have
    the averages as their weights, since those are what was validated, and beside them the weights being trained, with
    which `fit(ckpt_path=...)` goes on. When training ends, the module keeps the averages, also the driver's.

    Args:
        use_buffers: Also average floating-point buffers, such as the statistics of batch normalisation; False: the
            averaged weights are used with the buffers of the moment.
        avg_fn: Called with an average, the value of now, and how many values the average is made of; returns the new
            average. As that of `torch.optim.swa_utils.AveragedModel`.
        multi_avg_fn: Likewise of all averages and values at once; it changes the averages.
        device: Where to keep the averages, "cpu" say, which costs a copy at each update; None: on the module's device.

    Raises:
        ConfigurationError: Both functions are given.
    """

    def __init__(
        self,
        use_buffers: bool = True,
        *,
        avg_fn: One | None = None,
        multi_avg_fn: Many | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise ConfigurationError(f"{type(self).__name__}(avg_fn=..., multi_avg_fn=...): give one of both.")
        self.use_buffers, self.device = use_buffers, device
        self._avg_fn, self._multi_avg_fn = avg_fn, multi_avg_fn
        self._averaged: AveragedWeights | None = None
        self._ended: AveragedWeights | None = None  # once the module has the averages, for a checkpoint of the end
        self._step = 0  # of the last look

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights of now belong into the average [those of each step].

        Args:
            step_idx: Index of the optimizer step (from 0) that has been made; None after an epoch.
            epoch_idx: Index of the epoch that has ended; None after a step.
        """
        return step_idx is not None

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Begin anew."""
        self._averaged = self._ended = None

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        """Count steps from here."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after a step, where one is due."""
        step = trainer.global_step
        if step == self._step:
            return
        made, self._step = range(self._step, step), step
        # manual optimization may make several in a batch, and is asked of each: none is jumped over
        if any([self.should_update(step_idx=index) for index in made]):
            self._update(trainer, module)

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """Update after an epoch, where one is due."""
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._update(trainer, module)

    def on_validation_start(self, trainer: TrainerView, module: Module) -> None:
        """Put the averages into the module."""
        if self._averaged is not None and trainer.stage == "fit":
            self._averaged.swap(True)
            trainer.strategy.sync_buffers(module)  # each worker has averaged its own

    def on_validation_end(self, trainer: TrainerView, module: Module) -> None:
        """Take them out again."""
        self._swap_back()

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        """Take them out again."""
        self._swap_back()

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        """Leave the averages in the module."""
        if self._averaged is not None:
            self._averaged.swap(True)
            self._averaged, self._ended = None, self._averaged

    def on_fit_end(self, trainer: TrainerView, module: Module) -> None:
        """The same where training had ended by the checkpoint that the run goes on from."""
        self.on_train_end(trainer, module)

    def on_save_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Have the averages as the checkpoint's weights."""
        if self._averaged is not None:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self._averaged.averages}

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Take over the averages; put the weights that were being trained into the module."""
        state = checkpoint["worker_callbacks"].get(self.state_key)
        if state:
            self._averaged = self._averages_of(trainer, module)
            self._averaged.restore(checkpoint["state_dict"], state["current"], state["count"])

    def state_dict(self) -> dict[str, Any]:
        """The weights being trained; the averages are the checkpoint's."""
        averaged = self._averaged or self._ended
        return {} if averaged is None else {"current": averaged.current, "count": averaged.count}

    def teardown(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Let the weights go that were being trained."""
        self._ended = None

    def _update(self, trainer: TrainerView, module: Module) -> None:
        if self._averaged is None:
            self._averaged = self._averages_of(trainer, module)
        self._averaged.update()

    def _averages_of(self, trainer: TrainerView, module: Module) -> AveragedWeights:
        return AveragedWeights(module, trainer.strategy, self._averaging(), self.use_buffers, self.device)

    def _averaging(self) -> Many:
        """What changes all averages at once."""
        if self._avg_fn is not None:
            return of_all(self._avg_fn)
        return self._multi_avg_fn or get_swa_multi_avg_fn()

    def _swap_back(self) -> None:
        if self._averaged is not None:
            self._averaged.swap(False)
