"""Weights from safetensors files into a module in shards: each worker reads what it holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytrainer.checkpointing.safetensors_files import SafetensorsFiles
from raytrainer.errors import CheckpointError
from raytrainer.plan.folding import few
from raytrainer.private.dtensor_private import place_of
from raytrainer.strategies.meta_modules import StartWeights
from raytrainer.strategies.shards import local_part

__all__ = ["WeightFiles"]

log = logging.getLogger("raytrainer")


class WeightFiles:
    """The files that a module begins with.

    Args:
        module: The root, before it is sharded.
        source: Where they are.

    Attributes:
        given: Names of the module's parameters and buffers that are in them.

    Raises:
        CheckpointError: There are none, or they do not fit the module.
    """

    def __init__(self, module: nn.Module, source: StartWeights) -> None:
        self._source, self._files = source, SafetensorsFiles(source.path)
        shapes = self._files.shapes
        self.given: set[str] = set()
        missing, wrong = [], []
        for names, tensor in _named(module):
            theirs = self._theirs(names)
            if theirs is None:
                if isinstance(tensor, nn.Parameter) and any(source.name(name) is not None for name in names):
                    missing.append(f"{names[0]!r} (there {source.name(names[0])!r})")
            elif shapes[theirs] != tuple(tensor.shape):
                wrong.append(f"{theirs!r}: {shapes[theirs]} there, {tuple(tensor.shape)} here")
            else:
                self.given |= set(names)
        if wrong:
            raise CheckpointError(f"{source.path}: shapes do not fit {type(module).__name__}: {few(wrong, 5)}.")
        if missing and (source.strict or not self.given):
            raise CheckpointError(
                f"{source.path}: it lacks parameters of {type(module).__name__}: {few(missing, 5)}; it has "
                f"{few([repr(name) for name in shapes], 5)}. on_meta(..., names=...) says how names there follow from "
                f"those here, or None for what is not to be there; strict=False lets the others begin as without files."
            )
        if missing:
            log.warning("%s: it lacks, and these begin as without files: %s", source.path, few(missing, 5))
        left = shapes.keys() - {source.name(name) for name in self.given}
        if left:
            log.warning("%s: not used: %s", source.path, few(sorted(left), 5))

    @torch.no_grad()
    def load(self, module: nn.Module) -> None:
        """Put them into the module, which is in shards by now."""
        for names, tensor in _named(module):
            theirs = self._theirs(names)
            if theirs is not None and names[0] in self.given:
                block = place_of(tensor)[::-1] if isinstance(tensor, DTensor) else ((), None)
                local_part(tensor).copy_(self._files.read(theirs, *block))

    def _theirs(self, names: list[str]) -> str | None:
        """What a tensor is called in the files; of a tied one, by whichever name it has there."""
        there = [self._source.name(name) for name in names]
        return next((name for name in there if name is not None and name in self._files.shapes), None)


def _named(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each parameter and buffer, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for part in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in part:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from found.values()
