"""Short runs of copies of a module, which find something out and leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.data.combined_loader import as_list
from raytrainer.datamodule import DataModule
from raytrainer.module import Module
from raytrainer.plan.settings import Settings
from raytrainer.seeding import rng_untouched
from raytrainer.strategies.driver_side import driver_side
from raytrainer.view.trainer_view import TrainerView

__all__ = ["MakeProbe", "NoSchedulers", "Probe", "no_trace", "run_copy", "short_settings"]


class Probe(Protocol):
    """A Trainer for one short run."""

    settings: Settings
    num_training_batches: int | None
    interrupted: bool

    def fit(self, model: Module, train_dataloaders: Any = None, *, datamodule: DataModule | None = None) -> None:
        """Train."""


#: Makes one, from callbacks, loggers, and settings that differ from the Trainer's.
MakeProbe = Callable[..., Any]


def short_settings(settings: Settings, **changes: Any) -> Settings:
    """Those of a short run that only trains, until the step that `changes` say."""
    short: dict[str, Any] = {
        "max_epochs": None, "min_epochs": 0, "min_steps": None, "max_time": None, "fast_dev_run": 0,
        "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1, "snapshot_every": None,
        "log_gpu_memory": None, "max_failures": 0,
    }  # fmt: skip
    return replace(settings, **{**short, **changes})


class NoSchedulers(WorkerCallback):
    """Leaves schedulers out: they may wait for metrics, or end after a number of steps."""

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        if module.automatic_optimization:
            trainer.lr_scheduler_configs.clear()
        for config in trainer.lr_scheduler_configs:  # `training_step` itself steps these
            config.on_metric = False


def run_copy(probe: Probe, module: Module, loaders: Any, datamodule: DataModule | None) -> None:
    """Train a copy for a moment.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed: what was found until then says nothing, and the user wants no more.
    """
    probe.fit(driver_side(probe.settings).copy_module(module), loaders, datamodule=copy.copy(datamodule))
    if probe.interrupted:
        raise KeyboardInterrupt


@contextmanager
def no_trace(loaders: Any) -> Iterator[None]:
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
