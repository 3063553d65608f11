"""Modules on the meta device, made real part by part: each part whole, on the device, before it is cut into shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytrainer.errors import ConfigurationError
from raytrainer.plan.folding import few
from raytrainer.plan.seeds import derive_seed
from raytrainer.strategies.adapters_on_meta import adapters_of, initialise_adapters
from raytrainer.strategies.shards import held_as

__all__ = ["Materialiser"]

#: What transformers marks tensors with that its initialisation is to skip.
_DONE = "_is_hf_initialized"


class Materialiser:
    """Gives parts of a module memory and initial values.

    Values depend on the seed and the part's name alone, so that they are the same on any number of workers. They come
    from `reset_parameters()` of each module in the part that has parameters or buffers, as torch's own have it. In a
    model of transformers `_init_weights(module)` follows for each module, as it does there: its numbers are others than
    torch's, and modules that derive from torch's may have buffers of their own. PEFT's adapters begin as PEFT has them.

    Args:
        module: The root.
        device: Where parts are made.
        seed: The run's.
        given: Names of parameters and buffers that get their values later.
    """

    def __init__(self, module: nn.Module, device: torch.device, seed: int, given: Container[str] = frozenset()) -> None:
        self._device, self._seed, self._given = device, seed, given
        self._names = {id(part): name for name, part in module.named_modules()}
        self._initialisers, self._adapters = _initialisers(module), adapters_of(module)

    def make(self, part: nn.Module, but: Mapping[str, nn.Module]) -> None:
        """Make what is still on the meta device in a part, without the parts of `but`.

        Raises:
            ConfigurationError: Initialisation has left something unset; names it.
        """
        others = {id(inner) for other in but.values() if other is not part for inner in other.modules()}
        inside = [m for m in part.modules() if id(m) not in others]
        members = [m for m in inside if any(t.is_meta for held in (m, *_lists(m)) for _, t in _own_tensors(held))]
        if not members:
            return
        theirs = [m for m in reversed(inside) if id(m) in self._initialisers and _has_meta(m)]  # inner ones come first
        made: dict[int, Tensor] = {}
        splits: list[tuple[Any, str, DTensor]] = []  # what configure_model has split, or sharded
        for member in members:
            for kind in (member._parameters, member._buffers):
                for name, tensor in kind.items():
                    if isinstance(tensor, DTensor) and tensor.is_meta:
                        splits.append((kind, name, tensor))
                    if tensor is not None and tensor.is_meta:
                        kind[name] = self._memory(tensor, made)  # type: ignore[assignment]
        versions = {id(tensor): tensor._version for member in members for _, tensor in _own_tensors(member)}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(derive_seed(self._seed, "initial weights", self._names[id(part)]))
            for member in members:
                _reset(member)
            with _left_alone(part, made):
                for module in theirs:
                    self._initialisers[id(module)](module)
            initialise_adapters(self._adapters, inside, {id(member) for member in members})
        self._refuse_unset(members, versions)
        for kind, name, split in splits:
            kind[name] = _split(kind[name], split)

    def _memory(self, tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
        """Memory in place of a meta tensor, filled with what initialisation must replace; tied ones stay tied."""
        if id(tensor) not in made:
            real = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            if not isinstance(tensor, DTensor):
                real = torch.empty_like(tensor, device=self._device)  # with its memory format
            if real.is_floating_point() or real.is_complex():
                real.fill_(float("nan"))
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(real, requires_grad=tensor.requires_grad) if parameter else real
        return made[id(tensor)]

    def _refuse_unset(self, members: list[nn.Module], versions: dict[int, int]) -> None:
        unset = []
        for member in members:
            for name, tensor in _own_tensors(member):
                path = self._names[id(member)]
                full = f"{path}.{name}" if path else name
                if tensor.is_floating_point() or tensor.is_complex():
                    missing = bool(tensor.isnan().any())  # also where it was set through `.data`, which leaves no trace
                else:
                    missing = versions.get(id(tensor)) == tensor._version
                if missing and full not in self._given:
                    unset.append((full, type(member).__name__))
        if unset:
            shown = few([f"{name!r} (of a {kind})" for name, kind in unset], 5)
            if all(".parametrizations." in f".{name}" for name, _ in unset):
                raise ConfigurationError(
                    f"a module made with on_meta: {shown} belong to weights with a parametrisation (weight_norm, "
                    f"spectral_norm, orthogonal), which is computed from weights that are not there yet. Make these "
                    f"layers anew in configure_model(), where they are real: self.layer = weight_norm(nn.Linear(8, 8))."
                )
            raise ConfigurationError(
                f"a module made with on_meta: initialisation has left {shown} unset. Give their modules a method "
                f"reset_parameters() that sets all parameters and buffers which they have themselves or in a "
                f"ParameterList or ParameterDict, tables made in __init__ included; it is called once a module, on the "
                f"device, with a generator that is seeded."
            )


def _split(whole: Tensor, like: DTensor) -> Tensor:
    """This worker's part of a tensor that all have whole."""
    part = held_as(whole.detach(), like, whole.device)
    return nn.Parameter(part, requires_grad=whole.requires_grad) if isinstance(whole, nn.Parameter) else part


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in it that only hold parameters, and so are initialised with it."""
    for child in module.children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield child
            yield from _lists(child)


def _has_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _reset(member: nn.Module) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(member, name, None)
        if callable(reset):
            reset()
            return


@contextmanager
def _left_alone(part: nn.Module, made: Mapping[int, Tensor]) -> Iterator[None]:
    """Have transformers leave alone what has been made already: blocks within, and what has never been on meta."""
    new = {id(tensor) for tensor in made.values()}
    marked = [t for t in (*part.parameters(), *part.buffers()) if id(t) not in new and not hasattr(t, _DONE)]
    for tensor in marked:
        setattr(tensor, _DONE, True)
    try:
        yield
    finally:
        for tensor in marked:
            delattr(tensor, _DONE)


def _initialisers(module: nn.Module) -> dict[int, Callable[[nn.Module], Any]]:
    """For each part of a model of transformers the innermost model's `_init_weights`."""
    found: dict[int, Callable[[nn.Module], Any]] = {}
    for part in module.modules():
        initialise = getattr(part, "_init_weights", None)
        if callable(initialise) and _takes_a_module(initialise):
            found |= {id(inner): initialise for inner in part.modules()}
    return found


def _takes_a_module(initialise: Callable[..., Any]) -> bool:
    """Whether it is like transformers' own; others have methods of that name which initialise all at once."""
    try:
        inspect.signature(initialise).bind(None)
    except (TypeError, ValueError):
        return False
    return True
