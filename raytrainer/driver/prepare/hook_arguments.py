"""Hooks that cannot be called as they are: told before the run, rather than when one is due, or never."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from raytrainer.callbacks import Callback, WorkerCallback
from raytrainer.data.data_hooks import DataHooks
from raytrainer.datamodule import DataModule
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.module_hooks import ModuleHooks

__all__ = ["require_hook_arguments"]

#: Called in more than one way, which `worker/signatures.py` finds out.
_SEVERAL = {"training_step", "validation_step", "test_step", "predict_step"}


def require_hook_arguments(
    module: Module, datamodule: DataModule | None, callbacks: Iterable[Callback | WorkerCallback]
) -> None:
    """Refuse a hook that is no method, does not take its arguments, or whose body a call does not run.

    Raises:
        ConfigurationError: Names the hook, and what it is called with.
    """
    for owner in (module, datamodule, *callbacks):
        kinds: list[type] = [
            kind for kind in (ModuleHooks, DataHooks, Callback, WorkerCallback) if isinstance(owner, kind)
        ]
        hooks = [item for kind in kinds for item in vars(kind).items()]
        if isinstance(owner, Module):
            hooks.append(("configure_gradient_clipping", Module.configure_gradient_clipping))
        for name, declared in hooks:
            if inspect.isfunction(declared) and not name.startswith("_"):
                _require(owner, name, declared)


def _require(owner: Any, name: str, declared: Callable[..., Any]) -> None:
    own = getattr(owner, name, None)
    if own is None or getattr(own, "__func__", own) is declared:
        return
    who = f"{type(owner).__name__}.{name}"
    if not callable(own):
        if name.endswith("_dataset"):  # a name that many DataModules have for what their loaders read
            return
        raise ConfigurationError(f"{who} is {_kind(own)}: it is a method, def {name}(self...), which the run calls.")
    unrun = {inspect.isgeneratorfunction: "has a yield in it", inspect.iscoroutinefunction: "is an async def",
             inspect.isasyncgenfunction: "is an async def"}  # fmt: skip
    for is_so, why in unrun.items():
        if is_so(own) and not (name.endswith("_dataloader") and is_so is inspect.isgeneratorfunction):
            raise ConfigurationError(f"{who} {why}, so that calling it would run nothing of it: write a plain method.")
    if name in _SEVERAL:
        return
    names = _names(declared)
    try:
        taken = inspect.signature(own)
    except (TypeError, ValueError):  # made in C, or made up
        return
    counts = {len(names), len(names) - names.count("dataloader_idx")}
    if not any(_takes(taken, count) for count in counts):
        raise ConfigurationError(f"{who}{taken}: it is called as {name}({', '.join(names)}). Give it these parameters.")


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOaeio' else 'a'} {kind}"


@functools.cache
def _names(declared: Callable[..., Any]) -> list[str]:
    """With what a hook is called."""
    given = list(inspect.signature(declared).parameters.values())[1:]
    return [parameter.name for parameter in given if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _takes(signature: inspect.Signature, count: int) -> bool:
    only_by_name = {p.name: None for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    try:
        signature.bind(*[None] * count, **only_by_name)
    except TypeError:
        return False
    return True
