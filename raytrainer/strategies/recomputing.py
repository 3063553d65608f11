"""Activation checkpointing: a block's activations are computed anew in the backward pass, from what they began with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytrainer.errors import ConfigurationError
from raytrainer.strategies.same_numbers import same_numbers, version_of

__all__ = ["recomputed"]

#: What blocks of older versions of transformers are given to remember keys and values in, and what stands for nothing.
_CACHES = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}
_CACHE_MODULE = "transformers.cache_utils"

#: Bytes from which on a copy of a buffer takes longer than it takes to have one made.
_LARGE = 2**16

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
    A pass may begin to change one at any time. Small ones are copied before each; of large ones there is one copy, as
    long as nobody has written to them.
    """

    def __init__(self, block: nn.Module) -> None:
        self.parts = [part for part in block.modules() if part._buffers]
        self.saved = any(part._buffers.keys() - part._non_persistent_buffers_set for part in self.parts)
        self._changing: set[_Place] = set()
        self._looked_into: set[tuple[bool, ...]] = set()  # in which modes, for what is written to without a version
        self._kept: dict[_Place, _Kept] = {}  # of the large ones

    def begin(self) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """A first pass begins; return what `checkpoint` asks for the contexts of both."""
        before: dict[_Place, Tensor] = {}
        anew = self._modes() not in self._looked_into  # then all are compared, also what has no version of now
        for place, buffer in self._there():
            if place in self._changing or buffer.numel() * buffer.element_size() < _LARGE:
                before[place] = buffer.detach().clone()
            else:
                self._keep(place, buffer, anew)
        return lambda: (self._seen(before), _PutBack(before))

    @contextmanager
    def _seen(self, before: dict[_Place, Tensor]) -> Iterator[None]:
        yield
        for place, was in self._changed(but=before):
            before[place] = was
            self._changing.add(place)
            del self._kept[place]

    def unchanged(self, forward: _Forward) -> _Forward:
        """`forward`, which must not change any."""
        if not self.parts:
            return forward

        def looked_at(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            first, anew = not self._looked_into, self._modes() not in self._looked_into
            for place, buffer in self._there():
                self._keep(place, buffer, anew or place in self._changing)
            output = forward(*args, **kwargs)
            for (part, name), was in self._changed():
                if not self._kept[part, name].seems_old(part._buffers[name]):
                    self._changing.add((part, name))  # in every pass, it may be, and nothing but a look shows it
                if first or part._buffers[name].shape != was.shape:  # type: ignore[union-attr]
                    continue  # a table may be made by the first pass, and longer by any: a second one changes nothing
                kind = type(part).__name__.removeprefix("FSDP")
                raise ConfigurationError(
                    f"the forward pass changes buffer {name!r} of {kind}, which is not saved: with both "
                    f"activation_checkpointing and compile register it with persistent=True, or leave one of them out."
                )
            return output

        return looked_at

    def _there(self) -> Iterator[tuple[_Place, Tensor]]:
        for part in self.parts:
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    yield (part, name), buffer

    def _modes(self) -> tuple[bool, ...]:
        return tuple(part.training for part in self.parts)

    def _keep(self, place: _Place, buffer: Tensor, anew: bool) -> None:
        kept = self._kept.get(place)
        if anew or kept is None or kept.seems_old(buffer):
            self._kept[place] = _Kept(buffer, version_of(buffer), buffer.detach().clone())

    def _changed(self, but: Collection[_Place] = ()) -> list[tuple[_Place, Tensor]]:
        """What has other numbers than before the pass; and those. What is written to without a version is seen once."""
        modes = self._modes()
        all_of_them, found = modes not in self._looked_into, []
        self._looked_into.add(modes)
        for place, now in self._there():
            kept = None if place in but else self._kept.get(place)
            if kept is None or not (all_of_them or place in self._changing or kept.seems_old(now)):
                continue
            if not same_numbers(now, kept.copy):
                found.append((place, kept.copy))
        return found


class _Kept(NamedTuple):
    """A copy of a buffer, as it was in this version."""

    buffer: Tensor
    version: int
    copy: Tensor

    def seems_old(self, now: Tensor | None) -> bool:
        """Whether it is another buffer by now, or has been written to, as far as that has a version."""
        return now is not self.buffer or version_of(self.buffer) != self.version


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
