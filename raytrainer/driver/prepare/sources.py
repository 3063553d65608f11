"""What a verb of the Trainer was given: module, DataModule and loaders, told apart and checked."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.former_hooks import own_functions
from raytrainer.driver.prepare.ray_datasets import has_dataset
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.plan.nearest_names import nearest
from raytrainer.plan.strangers import is_lightnings
from raytrainer.worker.hook_calls import overridden

__all__ = ["require_data", "require_methods", "sources", "tell_of_half_a_validation"]

log = logging.getLogger("raytrainer")


def sources(
    model: Any, datamodule: DataModule | None, **given: Any
) -> tuple[Module, DataModule | None, dict[str, Any]]:
    """Module, DataModule and the loaders handed over, told apart and checked."""
    _require_module(model)
    loaders = {}
    for stage, value in given.items():
        if is_lightnings(value, "LightningDataModule"):
            raise ConfigurationError(_no_datamodule(value))
        if isinstance(value, DataModule):
            if datamodule is not None:
                raise ConfigurationError("two DataModules were given; pass one.")
            datamodule = value
        elif value is not None:
            _refuse_stages(stage, value)
            loaders[stage] = value
    if datamodule is not None and not isinstance(datamodule, DataModule):
        raise ConfigurationError(_no_datamodule(datamodule))
    return model, datamodule, loaders


def _refuse_stages(stage: str, value: Any) -> None:
    """A dict of training loaders is several to train from; of training and validation it would be a leak."""
    names = {str(name).lower() for name in value} if isinstance(value, dict) else set()
    if "train" in names and names & {"val", "valid", "validation", "eval", "evaluation", "dev", "test"}:
        raise ConfigurationError(
            f"{stage}_dataloaders has {', '.join(map(repr, value))}: all of it would be trained on, as several loaders "
            f"at once. Give each its place: fit(model, loaders['train'], loaders['val'])."
        )


def _no_datamodule(given: Any) -> str:
    if isinstance(given, type):
        return f"datamodule={given.__name__}, a class: give an object of it, such as {given.__name__}()."
    what = f"datamodule={type(given).__name__}"
    if is_lightnings(given, "LightningDataModule"):
        return f"{what} is a LightningDataModule of Lightning's: derive it from raytrainer.DataModule instead."
    hint = " Loaders are given without a name: fit(module, train_loader, val_loader)." * hasattr(given, "__iter__")
    return f"{what}: give a raytrainer.DataModule.{hint}"


def _require_module(model: Any) -> None:
    if isinstance(model, type):
        made = f"{model.__name__}()" if issubclass(model, Module) else "an object"
        raise ConfigurationError(f"model={model.__name__}, a class: give an object of it, such as {made}.")
    name = type(model).__name__
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if is_lightnings(model, "LightningModule"):
        raise ConfigurationError(
            f"model={name} is a LightningModule of Lightning's: derive it from raytrainer.Module instead. Its methods "
            f"can stay as they are; examples/guide/from-lightning.md lists what differs."
        )
    if inspect.isfunction(model):
        raise ConfigurationError(
            f"model={model.__name__}, a function: what a training loop does with a batch goes into training_step of a "
            f"raytrainer.Module, and its optimizer into configure_optimizers; examples/guide/from-ray-train.md and "
            f"from-a-loop.md show it."
        )
    if not isinstance(model, Module):
        what = f"model={name}"
        if "torch.nn.modules.module.Module" in bases:
            what += ", an nn.Module that does not say how it is trained"
        raise ConfigurationError(f"{what}: give a raytrainer.Module, with training_step and configure_optimizers.")
    if "_modules" not in vars(model):
        raise ConfigurationError(f"{name}.__init__ does not call super().__init__(): call it first.")


def tell_of_half_a_validation(module: Module, loaders: dict[str, Any], datamodule: DataModule | None) -> None:
    """Say so where one of validation's two parts is missing, and so nothing is validated."""
    owners = datamodule, module
    step = overridden(module, "validation_step")
    data = "val" in loaders or has_dataset("val", *owners)
    data = data or any(owner is not None and overridden(owner, "val_dataloader") for owner in owners)
    name = type(module).__name__
    if data and not step:
        meant = _misnamed("validation_step", module)
        log.warning("There is data for validation, but %s has no validation_step: nothing is validated.%s", name, meant)
    if step and not data:
        meant = _misnamed("val_dataloader", *owners)
        log.info("%s has a validation_step, but no validation loader was given: nothing is validated.%s", name, meant)


def require_methods(verb: str, module: Module, *names: str) -> None:
    """Raise a ConfigurationError if the module lacks one of the methods that `verb` needs."""
    for name in names:
        if not overridden(module, name):
            meant = _misnamed(name, module)
            raise ConfigurationError(f"{type(module).__name__} has no {name}(); {verb} needs one.{meant}")


def _misnamed(hook: str, *owners: Module | DataModule | None) -> str:
    """What to say of a method of the user's whose name is like that of a hook that is missing, or ""."""
    for owner in owners:
        if owner is not None:
            base = Module if isinstance(owner, Module) else DataModule
            for found in nearest(hook, own_functions(owner, base))[:1]:
                return f" There is {type(owner).__name__}.{found}(): did you mean that?"
    return ""


def require_data(verb: str, stage: str, loaders: dict[str, Any], module: Module, datamodule: DataModule | None) -> None:
    """Raise a ConfigurationError if there is nothing to `verb` for "train", "val", "test" or "predict"."""
    owners = datamodule, module
    if stage in loaders or has_dataset(stage, *owners):
        return
    if not any(owner is not None and overridden(owner, f"{stage}_dataloader") for owner in owners):
        what = "training data" if stage == "train" else "data"
        hook = f"{stage}_dataloader"
        meant = _misnamed(hook, *owners)
        raise ConfigurationError(f"{verb} needs {what}: pass a loader or DataModule, or write {hook}().{meant}")
