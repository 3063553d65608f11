"""Callbacks made of functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.errors import ConfigurationError
from raytrainer.plan.nearest_names import did_you_mean

__all__ = ["LambdaCallback", "LambdaWorkerCallback"]

_count = itertools.count()


class _Keyed:
    """Has a key of its own: it has no state, and there may be several."""

    @property
    def state_key(self) -> str:
        return str(self.__dict__["key"])


class LambdaCallback(_Keyed, Callback):
    """A `Callback` whose hooks are arguments: `LambdaCallback(on_fit_end=lambda trainer, module: ...)`.

    Args:
        hooks: Functions by the names of `Callback`'s hooks; each is called with that hook's arguments.

    Raises:
        ConfigurationError: There is no such hook, or it is no function.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        _take(self, Callback, hooks)


class LambdaWorkerCallback(_Keyed, WorkerCallback):
    """The same for a `WorkerCallback`'s hooks. The functions are sent to the workers.

    Args:
        hooks: Functions by the names of `WorkerCallback`'s hooks.

    Raises:
        ConfigurationError: There is no such hook, or it is no function.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        _take(self, WorkerCallback, hooks)


def _take(callback: Any, kind: type, hooks: dict[str, Callable[..., Any]]) -> None:
    known = _hooks(kind)
    for name, function in hooks.items():
        if name not in known:
            other = LambdaWorkerCallback if kind is Callback else LambdaCallback
            base = WorkerCallback if kind is Callback else Callback
            advice = did_you_mean(name, sorted(known)) or f"there are {sorted(known)}."
            if name in _hooks(base):
                advice = f"that is a hook of {other.__name__}."
            raise ConfigurationError(f"{type(callback).__name__}({name}=...): {advice}")
        if not callable(function):
            raise ConfigurationError(f"{type(callback).__name__}({name}={function!r}): give a function.")
        setattr(callback, name, function)
    callback.key = f"{type(callback).__name__}-{next(_count)}"


def _hooks(kind: type) -> set[str]:
    return {name for name in vars(kind) if name in ("setup", "teardown") or name.startswith("on_")}
