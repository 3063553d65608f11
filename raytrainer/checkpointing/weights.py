"""Weights alone: into a module, and out of one for use without this package."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytrainer.checkpointing.exported_file import put_in_place
from raytrainer.errors import CheckpointError, ConfigurationError
from raytrainer.plan.uris import absolute

__all__ = ["export_weights", "load_into", "require_state"]

log = logging.getLogger("raytrainer")


def load_into(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """`load_state_dict`, whose complaint says what to do.

    Raises:
        CheckpointError: Keys or shapes do not match.
    """
    try:
        keys = module.load_state_dict(dict(state_dict), strict=strict)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's weights do not fit {type(module).__name__}: {error}\nConstruct the module as it was "
            f"when saved, or set strict_loading = False on it to load what matches."
        ) from None
    for keys_of, names in (("the module", keys.missing_keys), ("the checkpoint", keys.unexpected_keys)):
        if names:
            log.warning("%s: weights that only %s has were left as they are: %s", type(module).__name__, keys_of, names)


def require_state(module: nn.Module, state: Any) -> dict[str, Any]:
    """What `state_dict` returned, if that can be weights: an own one may forget to return them.

    Raises:
        ConfigurationError: It is no dict.
    """
    if not isinstance(state, Mapping):
        raise ConfigurationError(
            f"{type(module).__name__}.state_dict() returned {type(state).__name__}: return the dict that "
            f"super().state_dict(...) makes."
        )
    return state  # type: ignore[return-value]


def export_weights(module: nn.Module, path: str | Path) -> None:
    """Write the module's state dict alone: as safetensors if `path` ends in ".safetensors", else with torch.save.

    Raises:
        CheckpointError: The safetensors package is missing, the file cannot be written, or another one is there that
            holds no weights. Or the module has none: it is on the meta device.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise CheckpointError(
            f"{path}: this {type(module).__name__} is on the meta device and has no weights; they are in the "
            f"checkpoints of its fit: raytrainer.export_weights(checkpoint, folder) writes them."
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    target = Path(absolute(os.fspath(path)))
    if target.suffix != ".safetensors":
        put_in_place({target: lambda new: torch.save(state, new)})
        return
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError(f"{path}: install the package safetensors to write this format.") from None
    # the format refuses tensors that share memory, such as tied weights: each gets its own
    own = {name: tensor.clone() for name, tensor in state.items()}
    put_in_place({target: lambda new: save_file(own, new)})
