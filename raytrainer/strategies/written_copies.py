"""Writes into a part of a tensor in shards that would be lost, since the part is a copy.

Of a whole tensor `weight[0]` is a view, and `weight[0].zero_()` changes the tensor. Of one that is in shards torch
gathers first what is cut along the shards, so that the same line changes a copy, which is dropped, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytrainer.errors import ConfigurationError
from raytrainer.private.dtensor_private import (
    DispatchMode,
    addresses_of,
    innermost_mode,
    is_dropped,
    memory_of,
    written_by,
)
from raytrainer.private.fsdp_private import hooks_after_accumulation

__all__ = ["WrittenCopies"]

#: So many copies are remembered before those that are gone are forgotten.
_MANY = 256


class WrittenCopies:
    """Has functions of the user's watched for such writes, which then raise.

    Args:
        module: Its parameters are named in the error.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._mode = module, _Mode(module)

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which is told of as `name`. Each operation in it takes some microseconds more."""

        def watching(*args: Any) -> Any:
            outer, self._mode.where = self._mode.where, name
            try:
                with self._mode:
                    return function(*args)
            finally:
                self._mode.where = outer

        return watching

    def leave_alone(self, part: nn.Module) -> None:
        """Have forward passes of a part not be looked into: they are compiled."""
        left: list[bool] = []

        def leave(*args: Any) -> None:
            left.append(innermost_mode() is self._mode)
            if left[-1]:
                self._mode.__exit__(None, None, None)

        def go_on(*args: Any) -> None:
            if left.pop():
                self._mode.__enter__()

        part.register_forward_pre_hook(leave)
        part.register_forward_hook(go_on, prepend=True, always_call=True)

    def watch_gradients_hooks(self) -> None:
        """Have those watched that parameters have been given by `register_post_accumulate_grad_hook`."""
        for name, parameter in self._module.named_parameters():
            hooks = hooks_after_accumulation(parameter)
            for key, hook in hooks.items():
                if not isinstance(hook, _Hook):
                    hooks[key] = _Hook(self.watched(f"A hook of {name!r}", hook))


class _Hook:
    """Is watched already."""

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self._hook = hook

    def __call__(self, parameter: Tensor) -> None:
        self._hook(parameter)


class _Mode(DispatchMode):
    """Sees each operation; knows the memory of copies that stand for parts of tensors in shards."""

    supports_higher_order_operators = True  # which take no tensors in shards

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is called for the first time in here is compiled all the same; else it would never be."""
        return True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module, self.where = module, ""
        self._copies: dict[int | None, tuple[Any, int]] = {}  # by the memory of each: that, and where what it copies is

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(each, DTensor) for each in types):
            return func(*args, **kwargs)
        if self._copies:
            for tensor in _written(func, args, kwargs):
                copy = self._copies.get(_key(tensor))
                if copy is not None and not copy[0].expired():
                    self._refuse(func, tensor, copy[1])
        result = func(*args, **kwargs)
        if getattr(func, "is_view", False) and isinstance(args[0], DTensor):
            for part in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(part, DTensor):
                    self._note(part, args[0])
        return result

    def _note(self, part: DTensor, whole: DTensor) -> None:
        memory = memory_of(part)
        if memory is None or memory.cdata == _key(whole) or whole.grad_fn is not None:
            return  # a view; or of an activation, which the backward pass alone has yet
        if len(self._copies) >= _MANY:
            self._copies = {key: copy for key, copy in self._copies.items() if not copy[0].expired()}
        self._copies[memory.cdata] = memory, addresses_of(whole).start

    def _refuse(self, func: Any, part: DTensor, whole: int) -> None:
        named: list[tuple[str, Tensor]] = [*self._module.named_parameters()]
        named += [(f"{name}.grad", each.grad) for name, each in named if each.grad is not None]
        shards = ((name, each) for name, each in named if isinstance(each, DTensor))
        unnamed = "a tensor in shards"
        name = next((repr(name) for name, tensor in shards if whole in addresses_of(tensor)), unnamed)
        if name == unnamed and is_dropped(part):  # a step in between, from which nothing else is made
            return
        raise ConfigurationError(
            f"{self.where} writes ({func.name().split('::')[-1].split('.')[0]}) to a part of {name}. Each worker has "
            f"a shard of it, so that this part is a copy, and what is written would be lost. Under torch.no_grad(), on "
            f"all workers, change the whole:\n    whole = tensor.full_tensor()\n    ...  # write to it\n"
            f"    tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))\n"
            f"with distribute_tensor of torch.distributed.tensor."
        )


_places = cache(written_by)  # of each operation once


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[DTensor]:
    """The tensors in shards that an operation is to change."""
    for place, name in _places(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, DTensor):
                yield each


def _key(tensor: DTensor) -> int | None:
    memory = memory_of(tensor)
    return None if memory is None else memory.cdata
