"""What comes home besides the state dict: plain attributes (counters, histories), and buffers that are not in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raytrainer.data.transfer import map_leaves, to_cpu

__all__ = ["INTERNAL", "buffers_apart", "plain_attributes"]

#: Attributes of torch's, and ours, that are no user data.
INTERNAL = frozenset(torch.nn.Module().__dict__) | {"_view", "_device", "_hparams", "_hparams_initial", "_toggled"}


def plain_attributes(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes (counters, histories), which training may have changed: of the module, and of those inside it.

    Returns:
        By submodule ("" is the module itself), then by name. Torch's own modules keep no such things.
    """
    found = {}
    for path, part in module.named_modules():
        if path and type(part).__module__.startswith("torch."):
            continue
        own = {k: v for k, v in vars(part).items() if k not in INTERNAL and _plain(v)}
        if own:
            found[path] = {name: map_leaves(value, to_cpu) for name, value in own.items()}
    return found


def buffers_apart(module: torch.nn.Module, state_dict: Mapping[str, Any]) -> tuple[list[str], dict[str, Tensor | None]]:
    """Names of the buffers that are in the state dict; and the others by name: not persistent, or None."""
    kept: list[str] = []
    others: dict[str, Tensor | None] = {}
    for path, part in module.named_modules():
        for own, value in part._buffers.items():
            name = f"{path}.{own}" if path else own
            if name in state_dict:
                kept.append(name)
            elif value is None or type(value) is Tensor:
                others[name] = None if value is None else to_cpu(value)
    return kept, others


def _plain(value: Any, depth: int = 4) -> bool:
    """Whether `value` is data rather than machinery: numbers, strings, tensors, and containers of them."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor)):
        return True
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return all(_plain(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return all(_plain(item, depth - 1) for pair in value.items() for item in pair)
    return False
