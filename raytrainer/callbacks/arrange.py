"""Putting a run's callbacks together, and refusing what could not work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.callbacks.progress import ProgressBar
from raytrainer.errors import ConfigurationError
from raytrainer.plan.strangers import is_lightnings
from raytrainer.stateful_callback import StatefulCallback

__all__ = ["arrange_callbacks"]


def arrange_callbacks(given: Any, others: Iterable[Callback | WorkerCallback]) -> list[Callback | WorkerCallback]:
    """`given` after those of `others` of whose type none is among it; callbacks that run last at the end.

    Raises:
        ConfigurationError: Something that is no callback, a driver's callback with batch-level hooks, or two that
            save a state under one key.
    """
    if given is None:
        chosen: list[Any] = []
    else:
        chosen = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for callback in chosen:
        _check(callback)
    kept = [c for c in others if not any(isinstance(g, type(c)) for g in chosen)]
    arranged: list[Callback | WorkerCallback] = sorted(
        [*kept, *chosen], key=lambda c: isinstance(c, Callback) and c.runs_last
    )
    keys = [callback.state_key for callback in arranged if _has_state(callback)]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ConfigurationError(
            f"several callbacks share the state key {sorted(twice)}: give them a state_key property that tells them "
            f"apart, or drop one."
        )
    return arranged


def _has_state(callback: Callback | WorkerCallback) -> bool:
    """Whether two with one key would be in each other's way: in checkpoints, or on the screen."""
    return type(callback).state_dict is not StatefulCallback.state_dict or isinstance(callback, ProgressBar)


def _require_made(callback: Callback | WorkerCallback) -> None:
    """What derives from one of this package's and leaves out its `__init__` has none of its attributes."""
    kind = type(callback)
    try:
        _ = callback.state_key
    except AttributeError as error:
        if "__init__" not in vars(kind):
            raise
        raise ConfigurationError(
            f"{kind.__name__}.__init__ does not call super().__init__(...): call it first ({error})."
        ) from None


def _check(callback: Any) -> None:
    if isinstance(callback, type):
        raise ConfigurationError(f"callback {callback.__name__}, a class: give an object, {callback.__name__}(...).")
    if isinstance(callback, (Callback, WorkerCallback)):
        _require_made(callback)
    if isinstance(callback, WorkerCallback):
        return
    if is_lightnings(callback, "Callback"):
        name = type(callback).__name__
        raise ConfigurationError(
            f"callback {name} is Lightning's: take raytrainer's, or derive it from raytrainer.Callback (on the driver) "
            f"or raytrainer.WorkerCallback (beside the module). examples/guide/lightning.md has each by its name."
        )
    if not isinstance(callback, Callback):
        raise ConfigurationError(
            f"callback {callback!r}: give a raytrainer Callback (on the driver) or WorkerCallback (beside the module)."
        )
    batch_level = [
        name
        for name in vars(WorkerCallback)
        if name.startswith("on_") and not hasattr(Callback, name) and hasattr(callback, name)
    ]
    if batch_level:
        raise ConfigurationError(
            f"{type(callback).__name__} is a Callback, which runs on the driver, and has {sorted(batch_level)}, which "
            f"happen in the workers: derive it from WorkerCallback."
        )
