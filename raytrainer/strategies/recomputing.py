"""Activation checkpointing: a block's activations are computed anew in the backward pass, from what they began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrainer.errors import ConfigurationError
from raytrainer.strategies.same_numbers import same_numbers

__all__ = ["recomputed"]

#: What blocks of older versions of transformers are given to remember keys and values in, and what stands for nothing.
_CACHES = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}
_CACHE_MODULE = "transformers.cache_utils"

_Forward = Callable[..., Any]
_Place = tuple[nn.Module, str]


def recomputed(block: nn.Module, forward: _Forward, compiles: Mapping[str, Any] | None) -> _Forward:
    """A block's forward pass whose activations are not kept.

    Args:
        block: The block.
        forward: Its forward pass.
        compiles: Options of torch.compile; None: not compiled. A compiler recomputes less, but has buffers changed by
            both passes; so it is given both only where all buffers are tables, which are not saved.
    """
    buffers = _Buffers(block)
    if compiles is not None and not buffers.saved:
        return buffers.unchanged(torch.compile(_computed_twice(forward), **compiles))
    return _computed_twice(forward if compiles is None else torch.compile(forward, **compiles), buffers)


def _computed_twice(forward: _Forward, buffers: _Buffers | None = None) -> _Forward:
    def computed_twice(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            args, kwargs = _without_caches(args, kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    if buffers is None or not buffers.parts:
        return computed_twice

    def computed_alike(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        args, kwargs = _without_caches(args, kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=buffers.begin(), **kwargs)

    return computed_alike


class _Buffers:
    """Buffers that a forward pass changes: the second pass begins with what the first began with, and leaves no trace.

    Otherwise batch normalisation would count each batch twice, and spectral normalisation compute other activations.
    Which ones change is seen the first time, and again when parts of the block are set to train or to evaluate.
    """

    def __init__(self, block: nn.Module) -> None:
        self.parts = [part for part in block.modules() if part._buffers]
        self.saved = any(part._buffers.keys() - part._non_persistent_buffers_set for part in self.parts)
        self._changing: dict[tuple[bool, ...], list[_Place]] = {}  # by what trains

    def begin(self) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """A first pass begins; return what `checkpoint` asks for the contexts of both."""
        modes = self._modes()
        known = modes in self._changing
        before = self._copies(self._changing[modes]) if known else self._copies()
        return lambda: (nullcontext() if known else self._seen(modes, before), _PutBack(before))

    def unchanged(self, forward: _Forward) -> _Forward:
        """`forward`, which must not change any."""
        if not self.parts:
            return forward

        def looked_at(*args: Any, **kwargs: Any) -> Any:
            modes = self._modes()
            known = self._changing.get(modes)
            if known == [] or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            before = self._copies(known)
            with self._seen(modes, before):
                output = forward(*args, **kwargs)
            for (part, name), was in before.items():
                now = part._buffers.get(name)
                if known is None or (now is not None and now.shape != was.shape):
                    continue  # a table may be made by the first pass, and longer by any: a second one changes nothing
                kind = type(part).__name__.removeprefix("FSDP")
                raise ConfigurationError(
                    f"the forward pass changes buffer {name!r} of {kind}, which is not saved: with both "
                    f"activation_checkpointing and compile register it with persistent=True, or leave one of them out."
                )
            return output

        return looked_at

    def _modes(self) -> tuple[bool, ...]:
        return tuple(part.training for part in self.parts)

    def _copies(self, places: list[_Place] | None = None) -> dict[_Place, Tensor]:
        if places is None:
            places = [(part, name) for part in self.parts for name in part._buffers]
        found = {(part, name): part._buffers[name] for part, name in places}
        return {place: buffer.detach().clone() for place, buffer in found.items() if buffer is not None}

    @contextmanager
    def _seen(self, modes: tuple[bool, ...], before: dict[_Place, Tensor]) -> Iterator[None]:
        yield
        for (part, name), was in [*before.items()]:
            now = part._buffers.get(name)
            if now is not None and same_numbers(now, was):
                del before[part, name]
        self._changing[modes] = list(before)


class _PutBack:
    """Has buffers be others: these, whose changes do not last. It may be entered again, by another backward pass."""

    def __init__(self, values: Mapping[_Place, Tensor]) -> None:
        self._values = values
        self._kept: dict[_Place, Tensor | None] = {}

    def __enter__(self) -> None:
        self._kept = {(part, name): part._buffers[name] for part, name in self._values if name in part._buffers}
        for part, name in self._kept:
            part._buffers[name] = self._values[part, name].clone()

    def __exit__(self, *error: object) -> None:
        for (part, name), buffer in self._kept.items():
            part._buffers[name] = buffer
        self._kept = {}


def _without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block that is computed twice: what it computes would be in a cache of transformers' twice."""
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs |= {name: none for name, none in _CACHES.items() if name in kwargs}
    return args, {name: None if _is_cache(value) else value for name, value in kwargs.items()}


def _is_cache(value: object) -> bool:
    """Whether it is a cache of transformers', whose argument has another name in each version."""
    return any(kind.__name__ == "Cache" and kind.__module__ == _CACHE_MODULE for kind in type(value).__mro__)
