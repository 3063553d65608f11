"""Steps and hooks of a batch, called with what they take: users leave out arguments, and decorators hide them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from raytrainer.errors import ConfigurationError

__all__ = ["bind_batch_hook", "bind_step"]

_GONE = {
    "dataloader_iter": "take (batch, batch_idx)",
    "optimizer_idx": "set self.automatic_optimization = False in __init__ and step each of self.optimizers() there",
    "hiddens": "cut sequences in the data, and keep the hidden state on self",
}


#: Parameters of methods that have been bound: an evaluation binds anew, and looking costs a tenth of a short one.
_known: WeakKeyDictionary[Callable[..., Any], list[inspect.Parameter]] = WeakKeyDictionary()


def _all_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    plain = getattr(function, "__func__", None) if type(function) is MethodType else None
    if plain is None:
        return list(inspect.signature(function).parameters.values())
    if plain not in _known:
        _known[plain] = list(inspect.signature(function).parameters.values())
    return _known[plain]


def _parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], bool]:
    """What it takes by position, and whether it takes any more (`*args`)."""
    parameters = _all_parameters(function)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return named, any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _by_name(function: Callable[..., Any]) -> list[str]:
    """What it takes by name only."""
    return [p.name for p in _all_parameters(function) if p.kind is p.KEYWORD_ONLY]


def bind_step(function: Callable[..., Any], name: str, loaders: int = 1) -> Callable[[Any, int, int], Any]:
    """A step as a function of (batch, batch_idx, dataloader_idx), whichever of them it takes.

    One that takes `*args` gets (batch, batch_idx), and dataloader_idx where there are several loaders.

    Raises:
        ConfigurationError: The step takes other arguments, or there are several loaders and no dataloader_idx.
    """
    named, more = _parameters(function)
    names = [p.name for p in named]
    required = sum(p.default is p.empty for p in named)
    for gone, instead in _GONE.items():
        if gone in names:
            raise ConfigurationError(f"{name}({', '.join(names)}): {gone} is not supported: {instead}.")
    only = [n for n in _by_name(function) if n in ("batch_idx", "dataloader_idx")]
    if (not names and not more) or required > 3:
        raise ConfigurationError(f"{name}({', '.join(names)}): take (batch), (batch, batch_idx) or, in evaluation, "
                                 f"(batch, batch_idx, dataloader_idx).")  # fmt: skip
    if only:
        return _with_keywords(function, 3 if "dataloader_idx" in names[2:3] else min(max(len(names), 1), 2), only)
    if len(names) == 2 and names[1] == "dataloader_idx":
        return lambda batch, batch_idx, dataloader_idx: function(batch, dataloader_idx)
    third = len(names) > 2 and (required > 2 or names[2] == "dataloader_idx")
    if third or (loaders > 1 and (more or len(names) > 2)):
        return function
    if loaders > 1:
        raise ConfigurationError(f"{name}({', '.join(names)}) with {loaders} loaders: add a dataloader_idx argument.")
    if len(names) == 1 and not more:
        return lambda batch, batch_idx, dataloader_idx: function(batch)
    return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)


def _with_keywords(function: Callable[..., Any], count: int, only: list[str]) -> Callable[[Any, int, int], Any]:
    """The first `count` by position, unless by name."""

    def call(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        numbers = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
        by_position = [batch] if "batch_idx" in only else [batch, batch_idx, dataloader_idx][:count]
        return function(*by_position, **{name: numbers[name] for name in only})

    return call


def bind_batch_hook(function: Callable[..., Any], name: str, loaders: int) -> Callable[..., Any]:
    """A hook of an evaluation's batches, whose last argument is dataloader_idx: given that if it takes it.

    With one loader it is left out where the hook has a default for it, or does not name it.

    Raises:
        ConfigurationError: There are several loaders, and the hook does not take it.
    """
    named, more = _parameters(function)
    names = [p.name for p in named]
    only = "dataloader_idx" in _by_name(function)
    if loaders == 1:
        index = names.index("dataloader_idx") if "dataloader_idx" in names else None
        if index is None or named[index].default is not inspect.Parameter.empty:
            return (
                (lambda *args: function(*args[:-1], dataloader_idx=args[-1]))
                if only
                else (lambda *args: function(*args[:-1]))
            )
        return function
    if only:
        return lambda *args: function(*args[:-1], dataloader_idx=args[-1])
    if more or "dataloader_idx" in names:
        return function
    raise ConfigurationError(f"{name}({', '.join(names)}) with {loaders} loaders: add a dataloader_idx argument.")
