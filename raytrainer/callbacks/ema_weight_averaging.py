"""Validate, save and end with an exponential moving average of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.swa_utils import get_ema_multi_avg_fn

from raytrainer.callbacks._averaging import AveragedWeights
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["EMAWeightAveraging"]


class EMAWeightAveraging(WorkerCallback):
    """Keeps an exponential moving average of the weights: average = decay * average + (1 - decay) * weights.

    The first average is the weights at the first update. Validations within `fit` run with the averages; afterwards
    training goes on from its own weights. Checkpoints have the averages as their weights, since those are what was
    validated, and beside them the weights being trained, with which `fit(ckpt_path=...)` goes on. When training ends,
    the module keeps the averages, also the driver's.

    Args:
        decay: In [0, 1]; nearer to 1 averages over more steps.
        update_every_n_steps: Optimizer steps between updates.
        update_starting_at_step: No update before this step.
        use_buffers: Also average floating-point buffers, such as the statistics of batch normalisation; False: the
            averaged weights are used with the buffers of the moment.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int = 0,
        use_buffers: bool = True,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigurationError(f"EMAWeightAveraging(decay={decay!r}): give a number in [0, 1].")
        self.decay, self.use_buffers = decay, use_buffers
        self.update_every_n_steps = checks.count("update_every_n_steps", update_every_n_steps, least=1)
        self.update_starting_at_step = checks.count("update_starting_at_step", update_starting_at_step, least=0)
        self._averaged: AveragedWeights | None = None
        self._step = 0  # of the last look

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Begin anew."""
        self._averaged = None

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
        self._step = step
        if step >= self.update_starting_at_step and step % self.update_every_n_steps == 0:
            if self._averaged is None:
                self._averaged = self._averages_of(trainer, module)
            self._averaged.update()

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
            self._averaged = None

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
        if self._averaged is None:
            return {}
        return {"current": self._averaged.current, "count": self._averaged.count}

    def _averages_of(self, trainer: TrainerView, module: Module) -> AveragedWeights:
        return AveragedWeights(module, trainer.strategy, get_ema_multi_avg_fn(self.decay), self.use_buffers)

    def _swap_back(self) -> None:
        if self._averaged is not None:
            self._averaged.swap(False)
