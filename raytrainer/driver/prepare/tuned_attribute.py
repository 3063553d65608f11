"""Attributes and hyperparameters that tuning reads and sets, wherever a module or DataModule keeps them."""

from __future__ import annotations

from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.module import Module

__all__ = ["get_attribute", "rate_attribute", "set_attribute"]

_RATE_NAMES = ("lr", "learning_rate")


def rate_attribute(module: Module) -> str:
    """The name under which the module keeps its learning rate.

    Raises:
        ConfigurationError: There is none.
    """
    for name in _RATE_NAMES:
        if _has(module, name):
            return name
    raise ConfigurationError(
        f"{type(module).__name__} has neither lr nor learning_rate, as attribute or in hparams: write one that "
        f"configure_optimizers reads, or say which: attr_name=..."
    )


def _has(owner: Any, name: str) -> bool:
    return owner is not None and (name in owner.hparams or hasattr(owner, name))


def get_attribute(name: str, *owners: Any) -> Any:
    """The attribute or hyperparameter of the first owner that has it.

    Raises:
        ConfigurationError: None has.
    """
    for owner in owners:
        if owner is not None and name in owner.hparams:
            return owner.hparams[name]
        if owner is not None and hasattr(owner, name):
            return getattr(owner, name)
    named = " nor ".join(type(owner).__name__ for owner in owners if owner is not None)
    raise ConfigurationError(f"{named} has no {name!r}, as attribute or in hparams.")


def set_attribute(name: str, value: Any, *owners: Any) -> None:
    """Set it where it is, in attributes and hyperparameters of all owners that have it."""
    for owner in owners:
        if owner is None:
            continue
        if name in owner.hparams:
            owner.hparams[name] = value
        if hasattr(owner, name):
            setattr(owner, name, value)
