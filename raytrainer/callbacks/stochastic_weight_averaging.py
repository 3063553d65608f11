"""End with the average of the weights that late epochs have ended with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import SWALR, get_swa_multi_avg_fn

from raytrainer.callbacks._averaging import AveragedWeights, One, of_all
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks
from raytrainer.private.torch_private import BATCH_NORMS
from raytrainer.view.scheduler_config import SchedulerConfig

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["StochasticWeightAveraging"]

log = logging.getLogger("raytrainer")

_STALE = (
    "the statistics of batch normalisation are still those of the weights before averaging; "
    "torch.optim.swa_utils.update_bn(loader, module) brings them up to date."
)


class StochasticWeightAveraging(WorkerCallback):
    """Averages the weights at the end of each epoch from `swa_epoch_start` on (Izmailov et al., 2018, 1803.05407).

    From there on `torch.optim.swa_utils.SWALR` takes the place of the module's schedulers and brings the learning rate
    to a constant one. Validations see the weights being trained. When training ends, the module (also the driver's)
    keeps the averages; for the statistics of batch normalisation, `training_step` runs once more over the training
    data, without gradients, also when `max_time` is over; after Ctrl-C it does not, and a warning says so. Averages are
    part of checkpoints, whose weights are those being trained.

    Args:
        swa_lrs: The learning rate to end at, or one for each of the optimizer's parameter groups. Groups that
            are added later end at the first one.
        swa_epoch_start: The first epoch (from 0) to average: an int, or a fraction of `max_epochs`.
        annealing_epochs: Epochs until the learning rate is reached; 0: at once.
        annealing_strategy: "cos" or "linear".
        avg_fn: As of `WeightAveraging`; None: the mean.
        device: As of `WeightAveraging`.

    Raises:
        ConfigurationError: An argument is out of range; there is not exactly one optimizer; a fraction of no limit;
            batch normalisation in a module with manual optimization, whose `training_step` needs gradients.
    """

    def __init__(
        self,
        swa_lrs: float | Sequence[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: One | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        rates = [swa_lrs] if isinstance(swa_lrs, (int, float)) else list(swa_lrs)
        for rate in rates:
            checks.number("StochasticWeightAveraging(swa_lrs)", rate, above=0.0, none=False)
        self.swa_lrs = rates[0] if isinstance(swa_lrs, (int, float)) else rates
        if not isinstance(swa_epoch_start, (int, float)) or isinstance(swa_epoch_start, bool):
            raise ConfigurationError(
                f"StochasticWeightAveraging(swa_epoch_start={swa_epoch_start!r}): give an epoch as an int, or a float "
                f"in [0, 1] for a fraction of max_epochs."
            )
        self.swa_epoch_start = checks.fraction_or_count("swa_epoch_start", swa_epoch_start)
        self.annealing_epochs = checks.count("annealing_epochs", annealing_epochs, least=0)
        self.annealing_strategy = checks.choice("annealing_strategy", annealing_strategy, ("cos", "linear"))
        self.avg_fn, self.device = avg_fn, device
        self._averaged: AveragedWeights | None = None
        self._ended: AveragedWeights | None = None  # once the module has the averages, for a checkpoint of the end
        self._first = 0

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Begin anew."""
        self._averaged = self._ended = None
        start, epochs = self.swa_epoch_start, trainer.max_epochs
        if isinstance(start, float):
            if epochs < 0 and stage == "fit":
                raise ConfigurationError(
                    f"StochasticWeightAveraging(swa_epoch_start={start}) without max_epochs: give the epoch as an int."
                )
            start = int(start * max(epochs, 0) + 1e-9)
        self._first = start

    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        """Refuse what would only fail at the end of training."""
        norms = [name for name, m in module.named_modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
        if norms and not module.automatic_optimization:
            raise ConfigurationError(
                f"StochasticWeightAveraging with manual optimization and batch normalisation ({', '.join(norms[:3])}): "
                f"its statistics would need training_step without gradients. Use automatic optimization, another kind "
                f"of normalisation, or EMAWeightAveraging, which averages the statistics too."
            )

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Take over the learning rate when it is time."""
        if self._averaged is None and trainer.current_epoch >= self._first:
            self._begin(trainer, module)

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """Take the epoch's weights into the average."""
        if self._averaged is not None:
            self._averaged.update()

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        """Put the averages into the module, and bring batch normalisation up to date with them."""
        averaged, self._averaged = self._averaged, None
        self._ended = averaged or self._ended
        if averaged is None or not averaged.count:
            log.warning("StochasticWeightAveraging: training ended before epoch %d; nothing is averaged.", self._first)
            return
        averaged.swap(True)
        norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.training and m.track_running_stats]
        if norms and trainer.interrupted:
            log.warning("StochasticWeightAveraging: the run was interrupted, so %s", _STALE)
        elif norms:
            _update_batch_norm(trainer, norms)

    def on_fit_end(self, trainer: TrainerView, module: Module) -> None:
        """Put the averages into the module where training had ended by the checkpoint that the run goes on from."""
        averaged, self._averaged = self._averaged, None
        self._ended = averaged or self._ended
        if averaged is None or not averaged.count:
            return
        averaged.swap(True)
        if any(isinstance(m, BATCH_NORMS) and m.track_running_stats for m in module.modules()):
            log.warning("StochasticWeightAveraging: the checkpoint is of a run that had ended, so %s", _STALE)

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Take over the averages, and have the scheduler that takes up the saved state next."""
        state = checkpoint["worker_callbacks"].get(self.state_key)
        if state:
            averaged = self._begin(trainer, module, resumed=True)
            if "current" in state:  # of the end, whose weights are the averages
                averaged.restore(checkpoint["state_dict"], state["current"], state["count"])
            elif state["count"]:
                averaged.restore(state["averages"], averaged.current, state["count"])

    def teardown(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Let the weights go that were being trained."""
        self._ended = None

    def state_dict(self) -> dict[str, Any]:
        """The averages; at the end, which has these as its weights, the weights that were being trained."""
        if self._ended is not None:
            return {"current": self._ended.current, "count": self._ended.count}
        if self._averaged is None:
            return {}
        return {"averages": self._averaged.averages, "count": self._averaged.count}

    def _begin(self, trainer: TrainerView, module: Module, resumed: bool = False) -> AveragedWeights:
        if len(trainer.optimizers) != 1:
            raise ConfigurationError(
                f"StochasticWeightAveraging needs one optimizer; configure_optimizers() gave {len(trainer.optimizers)}."
            )
        optimizer: Any = trainer.optimizers[0]
        rates: Any = self.swa_lrs
        if resumed and isinstance(rates, list):  # groups may have been added since it began
            rates = [*rates, *rates[:1] * (len(optimizer.param_groups) - len(rates))]
        if isinstance(rates, list) and len(rates) != len(optimizer.param_groups):
            raise ConfigurationError(
                f"StochasticWeightAveraging(swa_lrs={rates}): give a number, or one for each of the optimizer's "
                f"{len(optimizer.param_groups)} parameter groups."
            )
        scheduler = SWALR(optimizer, rates, self.annealing_epochs, self.annealing_strategy)  # type: ignore[arg-type]
        trainer.lr_scheduler_configs[:] = [SchedulerConfig(scheduler)]
        average = get_swa_multi_avg_fn() if self.avg_fn is None else of_all(self.avg_fn)
        self._averaged = AveragedWeights(module, trainer.strategy, average, use_buffers=False, device=self.device)
        return self._averaged


def _update_batch_norm(trainer: TrainerView, norms: Sequence[Any]) -> None:
    """Statistics over all workers' batches of one epoch, as `torch.optim.swa_utils.update_bn` has them for one."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts alike
    trainer.forward_epoch()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            if isinstance(statistic, torch.Tensor):
                # workers have had equally many batches
                statistic.copy_(trainer.all_gather(statistic).mean(0))
