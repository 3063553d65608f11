"""A worker's pieces of tensors apart from the rest of its state: they are large, and stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from raytrainer.checkpointing.pieces import KEY
from raytrainer.errors import CheckpointError
from raytrainer.tensor_packing import bytes_of_tensor, pack, tensor_of_bytes

__all__ = ["PieceInRay", "apart"]


def apart(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What others have too, packed, and the bytes of this worker's pieces; None: it has none.

    In the former, "pieces" says of each piece, by its key, where it belongs: "at", "shape" and the numbers' "dtype".
    """
    rest = pack({name: value for name, value in state.items() if name not in ("own", KEY)})
    if KEY not in state:
        return rest, None
    pieces = state[KEY]
    rest[KEY] = {
        key: {"at": piece["at"], "shape": piece["shape"], "dtype": piece["data"].dtype} for key, piece in pieces.items()
    }
    return rest, {key: bytes_of_tensor(piece["data"]) for key, piece in pieces.items()}


@dataclass(frozen=True)
class PieceInRay:
    """A piece of a tensor, among those of its worker in Ray's shared memory.

    Attributes:
        ref: Ray's reference to them all.
        key: Of this one.
        dtype: Of its numbers.
        shape: Its own.
    """

    ref: Any
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The piece, in shared memory where this node has it: copy before writing.

        Raises:
            CheckpointError: It is gone.
        """
        try:
            data = ray.get(self.ref)[self.key]
        except (RayError, TypeError) as error:  # a failure is there in its place
            raise CheckpointError(f"a shard of {self.key!r} is gone with the node that had it: {error}") from None
        return tensor_of_bytes(data, self.dtype, self.shape)

    def read_to(self, target: Tensor) -> None:
        """Copy the piece. Raises what `read` does."""
        target.copy_(self.read())
