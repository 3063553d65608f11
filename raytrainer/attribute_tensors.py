"""Tensors that a module keeps in plain attributes, also in dicts, lists and tuples there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["attribute_tensors"]

#: Containers in containers that are looked into.
_DEPTH = 4


def attribute_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Them and buffers, with the attribute's name, such as "body.cache"; parameters are not among them."""
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        attributes = {n: v for n, v in vars(part).items() if n not in ("_modules", "_parameters", "_buffers")}
        for name, value in {**attributes, **part._buffers}.items():
            for tensor in _tensors(value, _DEPTH):
                yield prefix + name, tensor


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, depth - 1)
