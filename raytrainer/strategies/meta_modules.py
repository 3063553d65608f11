"""Modules on the meta device, whose parameters have shapes alone: how they are made, and what they begin with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from raytrainer.errors import ConfigurationError
from raytrainer.plan.given_arguments import answers

__all__ = ["StartWeights", "is_on_meta", "on_meta", "refuse_meta", "start_weights_of"]

M = TypeVar("M", bound=nn.Module)

_ATTRIBUTE = "_start_weights"


@dataclass(frozen=True)
class StartWeights:
    """Files that a module begins with; see `on_meta`."""

    path: str
    names: Callable[[str], str | None] | None
    strict: bool

    def name(self, name: str) -> str | None:
        """What a tensor of the module is called in the files; None: it is not to be there."""
        return name if self.names is None else self.names(name)


@answers
def on_meta(
    make: Callable[[], M],
    weights: str | os.PathLike[str] | None = None,
    names: Callable[[str], str | None] | None = None,
    strict: bool = True,
) -> M:
    """A module whose parameters have shapes only, for a model that is too large for this process.

    Workers of strategy "fsdp" make it real block by block, and cut each block into shards before they make the next.
    The weights depend on the Trainer's seed alone, on however many workers. After `fit` the module here is as it was;
    the trained weights are in checkpoints.

    Each module in it that has parameters or buffers of its own sets them in `reset_parameters()`, as torch's own
    modules do; models of transformers do so in their way. What stays unset is an error that names it.

    Args:
        make: Constructs the module.
        weights: Begin with these instead: a safetensors file, or a folder of such, as models of Hugging Face come in;
            a path that all workers see, or a URI. Each worker reads what it holds. A checkpoint that is gone on with
            takes their place.
        names: What a parameter or buffer of the module is called in the files, by its name; None: it is not to be
            there, and begins as without files. Without: all, the same.
        strict: Whether each other parameter must be in the files; False: those that are not begin as without files, and
            a warning names them.

    Example:
        module = raytrainer.on_meta(lambda: Llama(layers=32, dim=4096))
    """
    with torch.device("meta"):
        module = make()
    if weights is not None:
        module.__dict__[_ATTRIBUTE] = StartWeights(os.fspath(weights), names, strict)
    return module


def start_weights_of(module: nn.Module) -> StartWeights | None:
    """The files that a module begins with."""
    return module.__dict__.get(_ATTRIBUTE)


def is_on_meta(module: nn.Module) -> bool:
    """Whether any of its parameters or buffers has a shape only."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def refuse_meta(module: nn.Module) -> None:
    """Raise a ConfigurationError for a module that has no weights yet."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ConfigurationError(
            'a module on the meta device (on_meta) has no weights yet: train it with strategy="fsdp", which makes them.'
        )
