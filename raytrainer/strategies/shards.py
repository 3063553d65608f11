"""Tensors of which this worker holds a shard (torch's DTensor), as pieces of a state and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from raytrainer.checkpointing.pieces import KEY, InPieces, Mark, map_tree, split
from raytrainer.private.dtensor_private import place_of

__all__ = ["copied_along", "held_as", "in_pieces", "local_part", "piece_held"]


def local_part(tensor: Tensor) -> Tensor:
    """What this worker holds of a tensor; shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def piece_held(tensor: Tensor) -> str:
    """Which piece of a tensor this worker holds; workers for which this is equal hold the same one. "": all of it."""
    if not isinstance(tensor, DTensor):
        return ""
    shape, at = place_of(tensor)
    return "" if shape == tuple(tensor.shape) else f"{shape} at {at}"


def copied_along(tensor: Tensor, mesh: Any) -> list[int]:
    """Dimensions of a run's mesh along which workers hold the same piece; none where its own is no part of that."""
    split_along: set[str] = set()
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names
        if names is None or not set(names) <= set(mesh.mesh_dim_names):
            return []
        split_along = {n for n, placed in zip(names, tensor.placements, strict=True) if not placed.is_replicate()}
    return [d for d, name in enumerate(mesh.mesh_dim_names) if name not in split_along and mesh.size(d) > 1]


def in_pieces(state: Mapping[str, Any], common: bool) -> dict[str, Any]:
    """A state with its shards apart, as `checkpointing/pieces.py` has it: this worker's part.

    Args:
        state: Has DTensors anywhere.
        common: Whether this worker gives all else, too.
    """
    pieces: dict[str, Any] = {}
    places: dict[Any, Any] = {}  # many tensors are alike, and training waits

    def apart(value: Any, path: str) -> Any:
        if not isinstance(value, DTensor):
            return value
        alike = value.shape, value.placements, id(value.device_mesh)
        if alike not in places:
            places[alike] = place_of(value)
        shape, at = places[alike]
        pieces[path] = {"at": at, "shape": shape, "data": local_part(value).detach()}
        return Mark(path, tuple(value.shape), value.dtype)

    tree, rest = split(state)
    with torch.no_grad():
        tree = map_tree(tree, apart)
    own = {"own": rest["own"]} if "own" in rest else {}
    return {**(tree | rest if common else own), KEY: pieces}


def held_as(value: Any, like: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of a state, whole or in pieces, as this worker holds `like`: its shard, or all of it.

    On the same device, unless another is given.
    """
    if not isinstance(like, DTensor):
        whole: Tensor = value.whole() if isinstance(value, InPieces) else value
        return whole
    shape, at = place_of(like)
    if isinstance(value, DTensor):
        return value
    where = device or local_part(like).device
    if isinstance(value, InPieces):
        local = value.block(at, shape, where)
    else:
        local = value[tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True))].to(where, copy=True).contiguous()
    with torch.no_grad():
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
