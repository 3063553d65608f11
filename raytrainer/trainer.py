"""`Trainer`: arguments become a plan, the plan a run, the run a result. There is no loop in here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from raytrainer.callbacks import Tuner
from raytrainer.checkpointing.places import CheckpointPath
from raytrainer.config import check_names, named
from raytrainer.data.ray.ray_dataset import as_ray_datasets
from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.ray_datasets import has_dataset, lazy_predictions
from raytrainer.driver.prepare.sources import require_data, require_methods, sources, tell_of_half_a_validation
from raytrainer.driver.reporting.results import by_loader, outputs_by_loader, print_results, say_end
from raytrainer.driver.saving.bring_home import bring_home
from raytrainer.driver.workers import idle_pool
from raytrainer.errors import ConfigurationError
from raytrainer.loggers import CSVLogger
from raytrainer.module import Module
from raytrainer.plan.declaring import documented
from raytrainer.plan.given_arguments import verb_answers
from raytrainer.plan.where_it_is import Whereabouts
from raytrainer.strategies.driver_side import driver_side
from raytrainer.tracebacks import folds_tracebacks
from raytrainer.trainer_checkpoints import CheckpointVerbs
from raytrainer.trainer_runs import Fitted
from raytrainer.trainer_tuning import TuningVerbs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trainer"]

log = logging.getLogger("raytrainer")


@documented
class Trainer(CheckpointVerbs, TuningVerbs):
    """Trains a Module on the driver's process, or on Ray workers that form a torch.distributed group.

    All counts of batches are per worker; a *step* is one optimizer step; steps take precedence over epochs, and a
    maximum beats a minimum. Arguments are declared, with what they mean, in `RunArguments` and `TrainerArguments`;
    `help` shows them here.

    Raises:
        ConfigurationError: A value, or a pair of values, cannot work.
    """

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A Trainer from plain values, such as a YAML or JSON file has.

        Args:
            config: Arguments by name. Callbacks, loggers and the like are `{"class_path": "package.Class", "init_args":
                {...}}`; a path without a dot names something of raytrainer's.

        Raises:
            ConfigurationError: There is no such argument or class, or a value cannot work.
        """
        arguments = named(config, "config")
        check_names(cls, arguments)
        return cls(**arguments)

    # ---------------------------------------------------------------- the four verbs

    @folds_tracebacks
    @verb_answers
    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: CheckpointPath | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train. Afterwards `model` holds the trained weights, buffers and hyperparameters.

        Args:
            model: The module.
            train_dataloaders: A training loader, a `RayDataset` (or `ray.data.Dataset`), or a DataModule.
            val_dataloaders: One validation loader or `RayDataset`, or a list of them.
            datamodule: Where loaders come from that are not given here.
            ckpt_path: A checkpoint to go on from: its path or URI; "last": the newest that this trainer's
                `ModelCheckpoint` finds, in an earlier process too (none: begin at the beginning); "best"; or what
                `ray.tune.get_checkpoint()` gives, when `TuneReportCallback` has reported it. A file of Lightning 2.x
                too: a log line says what of it is left out.
            weights_only: Nothing in a file is ever executed, unless this is False, and the file is one of Lightning's
                that holds more than plain data.

        Raises:
            Exception: Whatever user code raised; from a worker, with a `WorkerError` as its cause.
            ConfigurationError: Module, data and settings do not fit together.
            WorkerLostError: A worker is gone.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders, val=val_dataloaders)
        require_methods("fit", module, "training_step", "configure_optimizers")
        require_data("fit", "train", loaders, module, datamodule)
        tell_of_half_a_validation(module, loaders, datamodule)
        run = self._begin("fit", module, datamodule, loaders)
        beginning = self._read(ckpt_path, weights_only, begins=True)
        if beginning is None and not self.fast_dev_run:
            for callback in self._callbacks:
                if isinstance(callback, Tuner):
                    callback.tune(cast(Any, self), module, loaders.get("train"), datamodule)
        with run.started() as coordinator:
            if beginning is not None:
                run.resume(beginning.state, coordinator)
            report = coordinator.fit(beginning)
            bring_home(module, datamodule, report, coordinator.group, driver_side(self._settings))
            self._fitted, run.is_home = Fitted(module, coordinator.end_state), True
            self._emit("on_fit_end")
        if not self._probing:
            say_end(self._state)

    @folds_tracebacks
    @verb_answers
    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run one validation epoch.

        Args:
            model: The module; default: the one of the last run.
            dataloaders: One loader, a list of them, or a DataModule.
            ckpt_path: A checkpoint whose weights to use. Default: the module's own; without `model`, after a `fit`, the
                best one of that fit, if its `ModelCheckpoint` has one.
            verbose: Print the metrics.
            datamodule: Where loaders come from that are not given here.
            weights_only: As for `fit`.

        Returns:
            A list with one dict of metrics for each loader.
        """
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)[0]

    @folds_tracebacks
    @verb_answers
    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run one test epoch; arguments and result as for `validate`."""
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)[0]

    @folds_tracebacks
    @verb_answers
    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool = True,
        ckpt_path: CheckpointPath | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Predict every batch, on all workers.

        Returns:
            What `predict_step` returned for each batch, in the loader's order; with several loaders a list of such
            lists; None without `return_predictions`. For a `RayDataset` (or `ray.data.Dataset`) instead a
            `ray.data.Dataset` that is computed when it is read or written: each row's columns, and the columns that
            `predict_step` returned for it as a dict ("prediction" where it returned a tensor).
        """
        lazy = self._predict_lazily(model, dataloaders, datamodule, ckpt_path, weights_only)
        if lazy is not None:
            return lazy
        outputs, loaders = self._evaluate(
            "predict", model, dataloaders, ckpt_path, False, datamodule, weights_only, return_predictions
        )[1:]
        return outputs_by_loader(outputs, loaders) if return_predictions else None

    def _predict_lazily(
        self, given: Module | None, data: Any, datamodule: DataModule | None, ckpt_path: Any, weights_only: bool | None
    ) -> Any:
        """Predictions for Ray Datasets; None if it is something else that shall be predicted."""
        model = given or self._module
        if model is not None and datamodule is None and data is None and model is self._module:
            datamodule = self._datamodule
        no_loader = isinstance(data, DataModule) or data is None
        if model is None or (not no_loader and as_ray_datasets(data) is None):
            return None
        module, datamodule, loaders = sources(model, datamodule, predict=data)
        if not loaders and not has_dataset("predict", datamodule, module):
            return None
        chosen = self._chosen("predict", given, ckpt_path)
        run = self._begin("predict", module, datamodule, loaders)
        beginning = self._read(chosen, weights_only)
        state = None if beginning is None else beginning.state
        return lazy_predictions(run.task, self._settings, self._groups.cluster, state)

    def _evaluate(
        self,
        stage: str,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: CheckpointPath | None,
        verbose: bool,
        datamodule: DataModule | None,
        weights_only: bool | None,
        ask_predictions: bool = False,
    ) -> tuple[list[dict[str, float]], list[Any], int]:
        chosen = self._chosen(stage, model, ckpt_path)
        model = model if model is not None else self._module
        if model is None:
            raise ConfigurationError(f"{stage}() needs a model: this trainer has not run one yet.")
        if datamodule is None and dataloaders is None and model is self._module:
            datamodule = self._datamodule
        name = {"validate": "val"}.get(stage, stage)
        module, datamodule, loaders = sources(model, datamodule, **{name: dataloaders})
        if stage != "predict":
            require_methods(stage, module, {"validate": "validation_step", "test": "test_step"}[stage])
        require_data(stage, name, loaders, module, datamodule)
        if self._settings.limit(name) == 0:
            log.info("limit_%s_batches=0: nothing to %s.", name, stage)
            return [], [], 1
        beginning = self._read(chosen, weights_only)
        run = self._begin(stage, module, datamodule, loaders)
        self._state.resumed_from = None if beginning is None else beginning.state.pop("path")
        run.task.ask_predictions = ask_predictions
        with run.started() as coordinator:
            values, predictions = coordinator.evaluate(stage, beginning)
        batches = self._state.num_batches[stage]
        results = by_loader(values, len(batches)) if any(n != 0 for n in batches) else []
        if verbose:
            print_results(stage, results)
        return results, predictions, len(self._state.num_batches[stage])

    # ---------------------------------------------------------------- logging

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Give values to the loggers from a callback, at the current step unless another is given."""
        self._logs.rows([(self.global_step if step is None else step, {**metrics, "epoch": self.current_epoch})])

    @verb_answers
    def plot(self, names: str | Sequence[str] | None = None) -> Figure:
        """Logged metrics over steps, as a matplotlib figure: `CSVLogger.plot` of this trainer's first `CSVLogger`.

        Args:
            names: Metrics to plot, by full name, or without their stage ("loss" for "train_loss" and "val_loss").
                None: all.

        Raises:
            ConfigurationError: There is no `CSVLogger`, matplotlib is not installed, nothing was logged, or a name is
                unknown.
        """
        logger = next((found for found in self._loggers if isinstance(found, CSVLogger)), None)
        if logger is None:
            raise ConfigurationError(
                "plot: this trainer keeps no metrics to plot; give it a CSVLogger, as logger=True (the default) does."
            )
        return logger.plot(names)

    # ---------------------------------------------------------------- end

    @verb_answers
    def where(self, timeout: float = 15.0) -> list[Whereabouts]:
        """Where each worker of the run in progress is, also one that hangs; to be called from another thread.

        Args:
            timeout: Seconds that they get to answer.

        Returns:
            By rank, the user's line and what it waits for; `print(*trainer.where(), sep="\\n")` shows a line each.
        """
        coordinator = None if self._run is None else self._run.coordinator
        return [] if coordinator is None else coordinator.group.whereabouts(timeout)

    def close(self) -> None:
        """Release the workers now, rather than after the idle time."""
        idle_pool.close_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
