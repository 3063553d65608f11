"""Tied parameters that `configure_model` takes apart: torch splits, and shards, each name's for itself.

`parallelize_module` puts a new parameter in the place of each that it splits, and `fully_shard` of each that it shards,
so that an embedding and the layer which shares its weight would train two, without a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from raytrainer.errors import ConfigurationError

__all__ = ["ties_kept"]

_Place = tuple[nn.Module, str]


@contextmanager
def ties_kept(root: nn.Module) -> Iterator[None]:
    """What is done to a module here, must leave names that are one parameter one parameter.

    Ties count that the module has, and those that are made meanwhile; not what takes another whole parameter's place.

    Raises:
        ConfigurationError: Names that were one parameter are several shards.
    """
    known: dict[int, tuple[weakref.ref[nn.Parameter], list[_Place]]] = {}  # whole parameters, and where each is, or was
    at: dict[tuple[int, str], list[_Place]] = {}  # the same, by place

    def note(part: nn.Module, name: str, parameter: Any) -> None:
        if parameter is None or isinstance(parameter, DTensor):
            return
        place = id(part), name
        if place in at:
            at[place].remove((part, name))
        reference, group = known.get(id(parameter), (None, []))
        if reference is None or reference() is not parameter:
            group = []
            known[id(parameter)] = weakref.ref(parameter), group
        group.append((part, name))
        at[place] = group

    for part in root.modules():
        for name, parameter in part._parameters.items():
            note(part, name, parameter)
    hook = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()
    paths = {id(part): path for path, part in root.named_modules()}
    for group in {id(group): group for group in at.values()}.values():
        within = [(part, name) for part, name in group if id(part) in paths and part._parameters.get(name) is not None]
        found = [part._parameters[name] for part, name in within]
        if len({id(parameter) for parameter in found}) > 1 and any(isinstance(one, DTensor) for one in found):
            full = [f"{paths[id(part)]}.{name}".removeprefix(".") for part, name in within]
            raise ConfigurationError(
                f"configure_model has split {', '.join(map(repr, full))}, which are one parameter (tied), each for "
                f"itself, so that each would train its own. Split them alike, and tie them again at its end: "
                f"self.{full[1]} = self.{full[0]}."
            )
