"""The driver's side of a strategy: what it does with the user's own module before and after a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from raytrainer.attribute_tensors import attribute_tensors
from raytrainer.plan.settings import Settings
from raytrainer.strategies.same_numbers import same_numbers

__all__ = ["DriverSide", "driver_side"]

M = TypeVar("M", bound=nn.Module)


class DriverSide:
    """Where the driver's module is whole: all strategies so far."""

    def copy_module(self, module: M) -> M:
        """A module that a short run may train while the user's own stays as it is.

        What Python cannot copy (a lock, an open file, a generator) both have in common.
        """
        computed = _computed(module)
        try:
            return copy.deepcopy(module, dict(computed))
        except Exception:  # whatever a type's own copying raises
            return copy.deepcopy(module, {**computed, **_in_common(module, computed)})

    def take_home(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Put what `Strategy.home_state` gave into the user's module, which has these names."""
        _untie(module, state)
        # as in process, a precision such as 64 or "bf16-true" stays with the module
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in state:
                tensor.data = tensor.data.to(state[name].dtype)
        try:
            module.load_state_dict(dict(state))
        except RuntimeError:
            if not _reshaped(module, state):
                raise
            module.load_state_dict(dict(state))


def _untie(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give names that are one parameter here parameters of their own, where the workers have two."""
    found: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for path, part in module.named_modules():
        for attribute, parameter in part._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if parameter is None or name not in state:
                continue
            tied = found.setdefault(id(parameter), [])
            same = next((own for other, own in tied if same_numbers(state[other], state[name])), None)
            if tied and same is None:
                same = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            if same is not None:
                part._parameters[attribute] = same
            tied.append((name, same if same is not None else parameter))


def _reshaped(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Give tensors the shapes that they have got in the workers; whether any had another one."""
    found = False
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state and not is_lazy(tensor) and tensor.shape != state[name].shape:
            tensor.grad, tensor.data, found = None, tensor.data.new_empty(state[name].shape), True
    return found


def _computed(module: nn.Module) -> dict[int, Any]:
    """Copies of the tensors that a forward pass has left in a module (weight_norm's weight, say), by their ids.

    `copy.deepcopy`, which takes this as its memo, refuses tensors that have a graph. The next pass makes them anew.
    """
    return {id(tensor): tensor.detach().clone() for _, tensor in attribute_tensors(module) if not tensor.is_leaf}


def _in_common(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Values of attributes that cannot be copied, by their ids."""
    found = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                found[id(value)] = value
    return found


def driver_side(settings: Settings) -> DriverSide:
    """That of the strategy which the settings ask for."""
    return DriverSide()
