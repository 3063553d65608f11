"""Modules on the meta device, made real part by part: each part whole, on the device, before it is cut into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raytrainer.errors import ConfigurationError
from raytrainer.plan.seeds import derive_seed

__all__ = ["Materialiser", "is_on_meta", "on_meta", "refuse_meta"]

M = TypeVar("M", bound=nn.Module)


def on_meta(make: Callable[[], M]) -> M:
    """A module whose parameters have shapes only, for a model that is too large for this process.

    Workers of strategy "fsdp" make it real block by block, and cut each block into shards before they make the next.
    The weights depend on the Trainer's seed alone, on however many workers. After `fit` the module here is as it was;
    the trained weights are in checkpoints.

    Each module in it that has parameters or buffers of its own sets them in `reset_parameters()`, as torch's own
    modules do; models of transformers do so in their way. What stays unset is an error that names it.

    Args:
        make: Constructs the module.

    Example:
        module = raytrainer.on_meta(lambda: Llama(layers=32, dim=4096))
    """
    with torch.device("meta"):
        return make()


def is_on_meta(module: nn.Module) -> bool:
    """Whether any of its parameters or buffers has a shape only."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def refuse_meta(module: nn.Module) -> None:
    """Raise a ConfigurationError for a module that has no weights yet."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigurationError(
            'a module on the meta device (on_meta) has no weights yet: train it with strategy="fsdp", which makes them.'
        )


class Materialiser:
    """Gives parts of a module memory and initial values.

    Values depend on the seed and the part's name alone, so that they are the same on any number of workers. They come
    from `reset_parameters()` of each module in the part that has parameters or buffers, as torch's own have it, or from
    `_init_weights(module)` of a model of transformers that it belongs to.

    Args:
        module: The root.
        device: Where parts are made.
        seed: The run's.
    """

    def __init__(self, module: nn.Module, device: torch.device, seed: int) -> None:
        self._root, self._device, self._seed = module, device, seed
        self._names = {id(part): name for name, part in module.named_modules()}
        self._initialisers = _initialisers(module)

    def make(self, part: nn.Module, but: Mapping[str, nn.Module]) -> None:
        """Make what is still on the meta device in a part, without the parts of `but`.

        Raises:
            ConfigurationError: Initialisation has left something unset; names it.
        """
        others = {id(inner) for other in but.values() if other is not part for inner in other.modules()}
        members = [m for m in part.modules() if id(m) not in others and any(t.is_meta for _, t in _own_tensors(m))]
        if not members:
            return
        made: dict[int, Tensor] = {}
        for member in members:
            for kind in (member._parameters, member._buffers):
                for name, tensor in kind.items():
                    if tensor is not None and tensor.is_meta:
                        kind[name] = self._memory(tensor, made)  # type: ignore[assignment]
        versions = {id(tensor): tensor._version for member in members for _, tensor in _own_tensors(member)}
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(derive_seed(self._seed, "initial weights", self._names[id(part)]))
            for member in members:
                self._initialiser(member)(member)
        self._refuse_unset(members, versions)

    def _memory(self, tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
        """Memory in place of a meta tensor, filled with what initialisation must replace; tied ones stay tied."""
        if id(tensor) not in made:
            real = torch.empty_like(tensor, device=self._device)
            if real.is_floating_point() or real.is_complex():
                real.fill_(float("nan"))
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(real, requires_grad=tensor.requires_grad) if parameter else real
        return made[id(tensor)]

    def _initialiser(self, member: nn.Module) -> Callable[[nn.Module], Any]:
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(member, name, None)
            if callable(reset):
                return lambda module, reset=reset: reset()  # type: ignore[misc]
        return self._initialisers.get(id(member), lambda module: None)

    def _refuse_unset(self, members: list[nn.Module], versions: dict[int, int]) -> None:
        unset = []
        for member in members:
            for name, tensor in _own_tensors(member):
                untouched = versions.get(id(tensor)) == tensor._version
                if untouched or (tensor.is_floating_point() and bool(tensor.isnan().any())):
                    path = self._names[id(member)]
                    unset.append((f"{path}.{name}" if path else name, type(member).__name__))
        if unset:
            shown = ", ".join(f"{name!r} (of a {kind})" for name, kind in unset[:5])
            more = f" and {len(unset) - 5} more" if len(unset) > 5 else ""
            raise ConfigurationError(
                f"a module made with on_meta: initialisation has left {shown}{more} unset. Give their modules a method "
                f"reset_parameters() that sets all parameters and buffers which they have themselves, tables made in "
                f"__init__ included; it is called once a module, on the device, with a generator that is seeded."
            )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _initialisers(module: nn.Module) -> dict[int, Callable[[nn.Module], Any]]:
    """For each part of a model of transformers the innermost model's `_init_weights`."""
    found: dict[int, Callable[[nn.Module], Any]] = {}
    for part in module.modules():
        initialise = getattr(part, "_init_weights", None)
        if callable(initialise):
            found |= {id(inner): initialise for inner in part.modules()}
    return found
