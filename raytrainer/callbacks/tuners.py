"""Find a learning rate or a batch size before training begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from raytrainer.callbacks.callback import Callback

if TYPE_CHECKING:
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.datamodule import DataModule
    from raytrainer.module import Module
    from raytrainer.view.learning_rates import LearningRates

__all__ = ["BatchSizeFinder", "LearningRateFinder", "Tuner"]


class Tuner(Callback):
    """Runs at the beginning of each `fit` that goes on from no checkpoint, before there are workers."""

    def tune(self, trainer: RunningTrainer, module: Module, loaders: Any, datamodule: DataModule | None) -> None:
        """Find something out, and put it into `module` or `datamodule`. `loaders` are those for training."""


class LearningRateFinder(Tuner):
    """Sets the module's learning rate to what `Trainer.lr_find` suggests, before training.

    Args:
        min_lr: As for `Trainer.lr_find`, like those that follow.
        max_lr: The last rate.
        num_training: Steps.
        mode: "exponential" or "linear".
        early_stop_threshold: Stop where the loss is so many times its best.
        attr_name: Attribute or hyperparameter to set; None: `lr` or `learning_rate`.
        update_attr: False: search only.

    Attributes:
        result: What the last search has seen.
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        early_stop_threshold: float | None = 4.0,
        attr_name: str | None = None,
        update_attr: bool = True,
    ) -> None:
        self.options: dict[str, Any] = {
            "min_lr": min_lr, "max_lr": max_lr, "num_training": num_training, "mode": mode,
            "early_stop_threshold": early_stop_threshold, "attr_name": attr_name, "update_attr": update_attr,
        }  # fmt: skip
        self.result: LearningRates | None = None

    @property
    def optimal_lr(self) -> LearningRates | None:
        """`result`, by Lightning's name."""
        return self.result

    def tune(self, trainer: RunningTrainer, module: Module, loaders: Any, datamodule: DataModule | None) -> None:
        """Search, and set the rate."""
        self.result = trainer.lr_find(module, loaders, datamodule=datamodule, **self.options)


class BatchSizeFinder(Tuner):
    """Sets the batch size to the largest that fits into memory, as `Trainer.scale_batch_size` finds it.

    Put it before a `LearningRateFinder`, whose result depends on the batch size.

    Args:
        mode: "power" or "binsearch".
        steps_per_trial: Steps to try each size for.
        init_val: The first size.
        max_trials: Sizes to try at most.
        batch_arg_name: Attribute or hyperparameter of the DataModule or Module.
        margin: With "binsearch": set a size smaller by this share of the one found.
        max_val: No size above it; None: no limit.

    Attributes:
        optimal_batch_size: What the last search has found.
    """

    def __init__(
        self,
        mode: Literal["power", "binsearch"] = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        *,
        margin: float = 0.0,
        max_val: int | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "mode": mode, "steps_per_trial": steps_per_trial, "init_val": init_val, "max_trials": max_trials,
            "batch_arg_name": batch_arg_name, "margin": margin, "max_val": max_val,
        }  # fmt: skip
        self.optimal_batch_size: int | None = None

    def tune(self, trainer: RunningTrainer, module: Module, loaders: Any, datamodule: DataModule | None) -> None:
        """Search, and set the size."""
        self.optimal_batch_size = trainer.scale_batch_size(module, loaders, datamodule=datamodule, **self.options)
