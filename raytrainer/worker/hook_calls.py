"""Which hooks somebody overrode, bound once: a hook that nobody wrote costs one comparison with None."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.data.data_hooks import DataHooks
from raytrainer.module import Module
from raytrainer.worker.inference_tensors import explain_inference_tensor
from raytrainer.worker.signatures import bind_batch_hook

if TYPE_CHECKING:
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["Hooks", "made_by", "overridden", "skips_the_epoch", "watching"]

log = logging.getLogger("raytrainer")

#: Types of answers that mean nothing.
_TOLD: set[type] = set()


def overridden(owner: object, name: str) -> bool:
    """Whether `owner` has its own `name`, on its class or the instance, rather than the default of ours.

    Setting a hook to None (as for "no validation") counts as not overridden.
    """
    value = getattr(owner, name, None)
    if value is None:
        return False
    function = getattr(value, "__func__", value)
    return all(getattr(base, name, None) is not function for base in (Module, WorkerCallback, Callback, DataHooks))


def made_by(package: str, function: Any) -> bool:
    """Whether a function or method is a package's own, and not what somebody has put in its place under its name."""
    made_in: str = getattr(function, "__globals__", {}).get("__name__", "")
    return made_in.partition(".")[0] == package


def skips_the_epoch(answer: Any) -> bool:
    """Whether `on_train_batch_start` returned -1; what means nothing is told of, once."""
    if answer is None:
        return False
    try:
        if answer == -1:  # NumPy's and torch's numbers, too
            return True
    except (RuntimeError, ValueError):  # of several numbers nobody knows whether they are -1
        pass
    kind = type(answer)
    if kind not in _TOLD:  # once, whatever it returns in other batches
        _TOLD.add(kind)
        shown = repr(answer) if isinstance(answer, (bool, int, str)) else kind.__name__
        log.warning("on_train_batch_start returned %s, which means nothing: return -1 to skip the rest of the epoch, "
                    "or nothing.", shown)  # fmt: skip
    return False


#: A function, by a name, wrapped in what looks at it.
Watched: TypeAlias = Callable[[str, Callable[..., Any]], Callable[..., Any]]


class Hooks:
    """Calls hooks of the worker callbacks, then the module's, and tells `self.log` which hook runs.

    Args:
        view: The run.
        module: The user's.
        callbacks: The run's.
        profiled: Wraps what is called, for the profiler.
        watched: Wraps those hooks that the user has written, for what looks at what they do.
    """

    def __init__(
        self,
        view: TrainerView,
        module: Module,
        callbacks: Sequence[WorkerCallback],
        profiled: Watched = lambda name, function: function,
        watched: Watched = lambda name, function: function,
    ) -> None:
        self.view, self.module, self.callbacks = view, module, list(callbacks)
        self._profiled, self.watched = profiled, watched
        self._told: BaseException | None = None

    def bind(self, name: str, loaders: int | None = None) -> Callable[..., Any] | None:
        """One function that calls every overridden `name`, or None if nobody overrode it.

        It returns what the module's hook returned.

        Args:
            name: The hook's.
            loaders: For one of an evaluation's batches, whose last argument is dataloader_idx: how many there are.
        """
        view, module, metrics = self.view, self.module, self.view.metrics
        callbacks = [getattr(callback, name) for callback in self.callbacks if overridden(callback, name)]
        own = getattr(module, name) if overridden(module, name) else None
        if loaders is not None:
            callbacks = [bind_batch_hook(callback, name, loaders) for callback in callbacks]
            own = None if own is None else bind_batch_hook(own, name, loaders)
        if own is None and not callbacks:
            return None
        if own is not None:
            own = self.watched(name, own)
        callbacks = [each if made_by("raytrainer", each) else self.watched(name, each) for each in callbacks]

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

    def tell(self, error: BaseException) -> BaseException:
        """Call `on_exception` of callbacks and DataModule, once; what to raise: the error, or one that explains it."""
        if error is self._told:
            return error
        self._told = error = explain_inference_tensor(error, self.module) or error
        listeners: list[tuple[Any, tuple[Any, ...]]] = [(each, (self.view, self.module)) for each in self.callbacks]
        listeners += [] if self.view.datamodule is None else [(self.view.datamodule, ())]
        for listener, args in listeners:
            try:
                listener.on_exception(*args, error)
            except BaseException as another:  # must not take the place of the one that is to be told
                log.warning("%s.on_exception failed: %s", type(listener).__name__, another)
        return error

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


def watching(module: Module, mesh: Any) -> Watched:
    """What looks at hooks: for writes into copies of shards, where tensors are in some, on that mesh; else nothing."""
    if mesh is None:
        return lambda name, function: function
    from raytrainer.strategies.written_copies import WrittenCopies  # a second to import, which others need not spend

    return WrittenCopies(module).watched
