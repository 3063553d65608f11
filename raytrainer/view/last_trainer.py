"""The Trainer that a module or DataModule was last given to, known without keeping it alive; or one that was set."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["keep_trainer", "last_trainer", "remember_trainer"]


def remember_trainer(owner: object, trainer: object) -> None:
    """From now on `owner.trainer` is this one where no run is on."""
    owner.__dict__["_trainer"] = weakref.ref(trainer)


def keep_trainer(owner: object, trainer: object | None) -> None:
    """The user has set `owner.trainer`: it is this one where no run is on, and kept alive."""
    owner.__dict__["_trainer"] = None if trainer is None else lambda: trainer


def last_trainer(owner: object) -> Any:
    """The Trainer, or None: there was none, or it is gone."""
    reference = owner.__dict__.get("_trainer")
    return None if reference is None else reference()
