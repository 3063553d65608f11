"""What a verb of the Trainer was given: module, DataModule and loaders, told apart and checked."""

from __future__ import annotations

from typing import Any

from raytrainer.datamodule import DataModule
from raytrainer.driver.datasets import has_dataset
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.worker.hooks import overridden

__all__ = ["has_loader", "sources"]


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


def has_loader(stage: str, module: Module, datamodule: DataModule | None) -> bool:
    owners = datamodule, module
    return has_dataset(stage, *owners) or any(o is not None and overridden(o, f"{stage}_dataloader") for o in owners)
