"""What a verb of the Trainer was given: module, DataModule and loaders, told apart and checked."""

from __future__ import annotations

from typing import Any

from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.ray_datasets import has_dataset
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.worker.hook_calls import overridden

__all__ = ["require_data", "require_methods", "sources"]


def sources(
    model: Any, datamodule: DataModule | None, **given: Any
) -> tuple[Module, DataModule | None, dict[str, Any]]:
    """Module, DataModule and the loaders handed over, told apart and checked."""
    if not isinstance(model, Module):
        raise ConfigurationError(
            f"model={type(model).__name__}: give a raytrainer.Module; a plain nn.Module needs a training_step."
        )
    loaders = {}
    for stage, value in given.items():
        if isinstance(value, DataModule):
            if datamodule is not None:
                raise ConfigurationError("two DataModules were given; pass one.")
            datamodule = value
        elif value is not None:
            loaders[stage] = value
    if datamodule is not None and not isinstance(datamodule, DataModule):
        raise ConfigurationError(f"datamodule={type(datamodule).__name__}: give a raytrainer.DataModule.")
    return model, datamodule, loaders


def require_methods(verb: str, module: Module, *names: str) -> None:
    """Raise a ConfigurationError if the module lacks one of the methods that `verb` needs."""
    for name in names:
        if not overridden(module, name):
            raise ConfigurationError(f"{type(module).__name__} has no {name}(); {verb} needs one.")


def require_data(verb: str, stage: str, loaders: dict[str, Any], module: Module, datamodule: DataModule | None) -> None:
    """Raise a ConfigurationError if there is nothing to `verb` for "train", "val", "test" or "predict"."""
    owners = datamodule, module
    if stage in loaders or has_dataset(stage, *owners):
        return
    if not any(owner is not None and overridden(owner, f"{stage}_dataloader") for owner in owners):
        what = "training data" if stage == "train" else "data"
        raise ConfigurationError(f"{verb} needs {what}: pass a loader or DataModule, or write {stage}_dataloader().")
