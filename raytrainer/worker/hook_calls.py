"""Which hooks somebody overrode, bound once: a hook that nobody wrote costs one comparison with None."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.data.data_hooks import DataHooks
from raytrainer.module import Module

if TYPE_CHECKING:
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["Hooks", "bind_step", "overridden"]

log = logging.getLogger("raytrainer")


def overridden(owner: object, name: str) -> bool:
    """Whether `owner` has its own `name`, on its class or the instance, rather than the default of ours.

    Setting a hook to None (as for "no validation") counts as not overridden.
    """
    value = getattr(owner, name, None)
    if value is None:
        return False
    function = getattr(value, "__func__", value)
    return all(getattr(base, name, None) is not function for base in (Module, WorkerCallback, DataHooks))


class Hooks:
    """Calls hooks of the worker callbacks, then the module's, and tells `self.log` which hook runs."""

    def __init__(
        self,
        view: TrainerView,
        module: Module,
        callbacks: Sequence[WorkerCallback],
        profiled: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, function: function,
    ) -> None:
        self.view, self.module, self.callbacks, self._profiled = view, module, list(callbacks), profiled

    def bind(self, name: str) -> Callable[..., Any] | None:
        """One function that calls every overridden `name`, or None if nobody overrode it.

        It returns what the module's hook returned.
        """
        view, module, metrics = self.view, self.module, self.view.metrics
        callbacks = [getattr(callback, name) for callback in self.callbacks if overridden(callback, name)]
        own = getattr(module, name) if overridden(module, name) else None
        if own is None and not callbacks:
            return None

        def call(*args: Any) -> Any:
            outer, metrics.hook = metrics.hook, name
            try:
                for callback in callbacks:
                    callback(view, module, *args)
                return own(*args) if own is not None else None
            finally:
                metrics.hook = outer

        return self._profiled(name, call)

    def call(self, name: str, *args: Any) -> Any:
        """Call the hook now; for the rare ones."""
        bound = self.bind(name)
        return bound(*args) if bound is not None else None

    def tell(self, error: BaseException) -> None:
        """Call the callbacks' `on_exception`."""
        for callback in self.callbacks:
            try:
                callback.on_exception(self.view, self.module, error)
            except BaseException as another:  # must not take the place of the one that is to be told
                log.warning("%s.on_exception failed: %s", type(callback).__name__, another)

    def guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with `self.log` knowing that `name` runs; profiled."""
        return self._profiled(name, self.named(name, function))

    def named(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with `self.log` and `self.logger` knowing that `name` runs."""
        metrics = self.view.metrics

        def call(*args: Any) -> Any:
            outer, metrics.hook = metrics.hook, name
            try:
                return function(*args)
            finally:
                metrics.hook = outer

        return call


def bind_step(function: Callable[..., Any], name: str, loaders: int = 1) -> Callable[[Any, int, int], Any]:
    """A step as a function of (batch, batch_idx, dataloader_idx), whichever of them it takes.

    Raises:
        ConfigurationError: The step takes other arguments, or there are several loaders and no dataloader_idx.
    """
    import inspect

    from raytrainer.errors import ConfigurationError

    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if "dataloader_iter" in names:
        raise ConfigurationError(f"{name}(dataloader_iter) is not supported: take (batch, batch_idx).")
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return function
    if not names or len(required) > 3:
        raise ConfigurationError(f"{name}({', '.join(names)}): take (batch), (batch, batch_idx) or, in evaluation, "
                                 f"(batch, batch_idx, dataloader_idx).")  # fmt: skip
    if len(names) == 1:
        if loaders == 1:
            return lambda batch, batch_idx, dataloader_idx: function(batch)
    elif len(names) == 2:
        if names[1] == "dataloader_idx":
            return lambda batch, batch_idx, dataloader_idx: function(batch, dataloader_idx)
        if loaders == 1:
            return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    else:
        return function
    raise ConfigurationError(f"{name}({', '.join(names)}) with {loaders} loaders: add a dataloader_idx argument.")
