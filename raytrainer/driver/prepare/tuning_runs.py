"""Finding a learning rate and a batch size by short runs of copies of the module."""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.data.loaders import as_list
from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.tuned_attribute import get_attribute, set_attribute
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.loggers import Logger
from raytrainer.module import Module
from raytrainer.plan.searches import SizeSearch, diverged_at, rates, smoothed, steepest
from raytrainer.plan.settings import Settings
from raytrainer.seeding import rng_untouched

if TYPE_CHECKING:
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["LearningRates", "find_learning_rate", "scale_batch_size", "short_settings"]

log = logging.getLogger("raytrainer")

_LOSS, _RATE = "lr_find/loss", "lr_find/rate"


class Probe(Protocol):
    """A Trainer for one short run."""

    num_training_batches: int | None
    interrupted: bool

    def fit(self, model: Module, train_dataloaders: Any = None, *, datamodule: DataModule | None = None) -> None:
        """Train."""


#: Makes one, from callbacks, loggers, and settings that differ from the Trainer's.
MakeProbe = Callable[..., Any]


@dataclass
class LearningRates:
    """What `Trainer.lr_find` has seen.

    Attributes:
        results: "lr": the learning rates tried; "loss": the loss at each, smoothed; "raw": as it was.
        attribute: The attribute that was set to the suggestion, if any.
    """

    results: dict[str, list[float]] = field(default_factory=dict)
    attribute: str | None = None

    def suggestion(self, skip_begin: int | None = None, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls fastest, by the slope over a fifth of the rates around it.

        Args:
            skip_begin: Leave out so many of the first rates; None: a tenth of them, at most 10.
            skip_end: Leave out so many of the last, where the loss may be blowing up.

        Returns:
            None where the loss does not fall, or no rate is left.
        """
        if skip_begin is None:
            skip_begin = min(10, len(self.results["raw"]) // 10)
        index = steepest(self.results["raw"], skip_begin, skip_end)
        return None if index is None else self.results["lr"][index]

    def plot(self, suggest: bool = True, ax: Any = None) -> Any:
        """Loss against learning rate as a matplotlib figure.

        Args:
            suggest: Mark the suggestion.
            ax: Draw here; None: a new figure.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ConfigurationError("plot() needs matplotlib: pip install matplotlib") from error
        if ax is None:
            ax = Figure().add_subplot()
        ax.plot(self.results["lr"], self.results["loss"])
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("smoothed loss")
        rate = self.suggestion() if suggest else None
        if rate is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o")
        return ax.figure


def short_settings(settings: Settings, **changes: Any) -> Settings:
    """Those of a short run that only trains, until the step that `changes` say."""
    short: dict[str, Any] = {
        "max_epochs": None, "min_epochs": 0, "min_steps": None, "max_time": None, "fast_dev_run": 0,
        "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1, "snapshot_every": None,
        "log_gpu_memory": None, "max_failures": 0,
    }  # fmt: skip
    return replace(settings, **{**short, **changes})


class _NoSchedulers(WorkerCallback):
    """Leaves schedulers out: they may wait for metrics, or end after a number of steps."""

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        if module.automatic_optimization:
            trainer.lr_scheduler_configs.clear()
        for config in trainer.lr_scheduler_configs:  # `training_step` itself steps these
            config.on_metric = False


class _Sweep(_NoSchedulers):
    """Raises the learning rate from step to step, and logs the loss."""

    def __init__(self, lrs: list[float]) -> None:
        self.lrs, self.rate = lrs, lrs[0]
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
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            self.silent += 1
            if self.silent == len(self.lrs):
                raise _no_loss(module)
            return
        self.silent = -sys.maxsize
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
    def __init__(self, taken: _Losses, threshold: float | None) -> None:
        self.taken, self.threshold = taken, threshold

    def on_train_chunk_end(self, trainer: Any, module: Module, report: Any) -> None:
        if diverged_at(smoothed(self.taken.losses), self.threshold) is not None:
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
    taken = _Losses()
    probe = make_probe([_Sweep(lrs), _StopWhenDiverged(taken, early_stop_threshold)], [taken], max_steps=num_training)
    with _no_trace(loaders):
        _run(probe, module, loaders, datamodule)
    if not taken.losses:
        raise _no_loss(module)
    smooth = smoothed(taken.losses)
    end = diverged_at(smooth, early_stop_threshold)
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


def scale_batch_size(
    make_probe: MakeProbe,
    module: Module,
    datamodule: DataModule | None,
    *,
    mode: str,
    steps_per_trial: int,
    init_val: int,
    max_trials: int,
    attribute: str,
) -> int:
    """See `Trainer.scale_batch_size`."""
    search = SizeSearch(mode, init_val, max_trials)
    if steps_per_trial < 1:
        raise ConfigurationError(f"scale_batch_size(steps_per_trial={steps_per_trial}): give 1 or more.")
    before = get_attribute(attribute, datamodule, module)
    try:
        while search.size is not None:
            size = search.size
            set_attribute(attribute, size, datamodule, module)
            probe = make_probe([_NoSchedulers()], [], max_steps=steps_per_trial, limit_train_batches=1.0)
            worked = _fits(probe, module, datamodule)
            log.info("scale_batch_size: %d %s", size, "works" if worked else "does not fit into memory")
            search.tell(worked, enough=probe.num_training_batches == 1)
    finally:
        set_attribute(attribute, before, datamodule, module)
    if search.best is None:
        raise ResourceError(f"scale_batch_size: no batch size from {init_val} down to 1 fits into memory.")
    set_attribute(attribute, search.best, datamodule, module)
    return search.best


def _run(probe: Probe, module: Module, loaders: Any, datamodule: DataModule | None) -> None:
    """Train a copy for a moment.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed: what was found until then says nothing, and the user wants no more.
    """
    probe.fit(copy.deepcopy(module), loaders, datamodule=copy.copy(datamodule))
    if probe.interrupted:
        raise KeyboardInterrupt


def _fits(probe: Probe, module: Module, datamodule: DataModule | None) -> bool:
    """Whether a short run of a copy has enough memory."""
    try:
        with _no_trace(None):
            _run(probe, module, None, datamodule)
        return True
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return False


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text
        for words in ("out of memory", "cublas_status_alloc_failed", "can't allocate memory", "not enough memory")
    )


@contextmanager
def _no_trace(loaders: Any) -> Iterator[None]:
    """Generators of this process, and of loaders that have their own, are afterwards as they were."""
    generators = [getattr(loader, "generator", None) for loader in as_list(loaders)]
    own = [generator for generator in generators if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in own]
    try:
        with rng_untouched():
            yield
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)
