"""`TuningVerbs`: the verbs of a `Trainer` that find something out by short runs before training."""

from __future__ import annotations

from typing import Any

from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.batch_size_search import scale_batch_size
from raytrainer.driver.prepare.lr_find import find_learning_rate
from raytrainer.driver.prepare.sources import sources
from raytrainer.driver.prepare.tuned_attribute import rate_attribute
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.plan.given_arguments import verb_answers
from raytrainer.tracebacks import folds_tracebacks
from raytrainer.view.learning_rates import LearningRates

__all__ = ["TuningVerbs"]


class TuningVerbs:
    """`lr_find` and `scale_batch_size`."""

    def _probe(self, callbacks: Any, loggers: Any, **settings: Any) -> Any:
        """A copy of this Trainer for a short run of its own that writes nothing, with other `settings`."""
        raise NotImplementedError

    @folds_tracebacks
    @verb_answers
    def lr_find(
        self,
        model: Module,
        train_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: str = "exponential",
        *,
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = False,
        attr_name: str | None = None,
    ) -> LearningRates:
        """Train a copy of the module for a few steps, with a learning rate that rises, and look at the loss.

        The module, its weights and this process's generators are as before. All parameter groups have the same rate;
        schedulers, callbacks and loggers are left out. The workers are those of this Trainer.

        Args:
            model: The module.
            train_dataloaders: A training loader, or a DataModule.
            datamodule: Where the loader comes from if it is not given.
            min_lr: The first learning rate.
            max_lr: The last one.
            num_training: Steps.
            mode: "exponential" or "linear".
            early_stop_threshold: Stop where the smoothed loss is so many times its best, after a tenth of the steps;
                None: do not.
            update_attr: Set `attr_name` of the module to the suggestion, if there is one.
            attr_name: An attribute or hyperparameter; None: `lr` or `learning_rate`.

        Returns:
            The rates and losses, with `suggestion()` and `plot()`.

        Raises:
            ConfigurationError: An argument cannot work, or the module has no such attribute.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders)
        attribute = (attr_name or rate_attribute(module)) if update_attr else None
        return find_learning_rate(
            self._probe, module, loaders.get("train"), datamodule,
            min_lr=min_lr, max_lr=max_lr, num_training=num_training, mode=mode,
            early_stop_threshold=early_stop_threshold, attribute=attribute,
        )  # fmt: skip

    @folds_tracebacks
    @verb_answers
    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        *,
        margin: float = 0.0,
        max_val: int | None = None,
    ) -> int:
        """Find the largest batch size that fits into memory, and set it.

        Copies of the module train for a few steps each; the module's weights and this process's generators are as
        before. The search also ends where one batch holds all the data.

        Args:
            model: The module.
            train_dataloaders: A DataModule; loaders that are made already have a batch size that stays.
            datamodule: Likewise.
            mode: "power": double the size until it no longer fits; "binsearch": then halve the gap until it is known.
            steps_per_trial: Steps to try each size for.
            init_val: The first size.
            max_trials: Sizes to try at most.
            batch_arg_name: Attribute or hyperparameter of the DataModule or Module, which `train_dataloader` reads.
            margin: With "binsearch": set a size smaller by this share of the one found, so that something is left for
                what training needs later.
            max_val: No size above it; None: no limit.

        Returns:
            The size.

        Raises:
            ConfigurationError: An argument cannot work, or nothing has such an attribute.
            ResourceError: No size fits.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders)
        if loaders:
            raise ConfigurationError(
                "scale_batch_size was given a loader, whose batch size stays as it is: write train_dataloader() in "
                "the DataModule or Module, and have it read self.batch_size."
            )
        return scale_batch_size(
            self._probe, module, datamodule,
            mode=mode, steps_per_trial=steps_per_trial, init_val=init_val, max_trials=max_trials,
            attribute=batch_arg_name, margin=margin, max_val=max_val,
        )  # fmt: skip
