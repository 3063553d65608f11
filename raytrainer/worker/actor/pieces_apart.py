"""A worker's pieces of tensors apart from the rest of its state: they are large, and stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from raytrainer.checkpointing.pieces import KEY, places_of
from raytrainer.errors import CheckpointError
from raytrainer.memory_segments import Handed, SegmentBytes
from raytrainer.tensor_packing import bytes_of_tensor, pack, tensor_of_bytes

__all__ = ["PieceInRay", "PieceInSegment", "apart", "bytes_there"]


def apart(state: Mapping[str, Any], handed: Handed | None = None) -> tuple[dict[str, Any], Any]:
    """What others have too, packed, and the bytes of this worker's pieces, or where they are, `handed`; None: none.

    In the former, "pieces" says of each piece, by its key, where it belongs: "at", "shape" and the numbers' "dtype".
    """
    rest = pack({name: value for name, value in state.items() if name not in ("own", KEY)})
    if KEY not in state:
        return rest, None
    pieces = state[KEY]
    if handed is not None:
        return rest | {KEY: pieces}, handed
    rest[KEY] = places_of(pieces)
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


@dataclass(frozen=True)
class PieceInSegment:
    """A piece of a tensor in a memory segment of a node's.

    Attributes:
        place: Where it is.
        node: Ray's id of the node.
        dtype: Of its numbers.
        shape: Its own.
    """

    place: SegmentBytes
    node: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """A copy of the piece: the segment will have other content later.

        Raises:
            CheckpointError: It is gone.
        """
        found = torch.empty(self.shape, dtype=self.dtype)
        if found.numel():
            room = bytes_of_tensor(found).data
            try:
                self.place.read_into(room)
            except OSError:  # on another node
                room[:] = bytes_there(self.place, self.node)
        return found

    def read_to(self, target: Tensor) -> None:
        """Copy the piece. Raises what `read` does."""
        if target.device.type == "cpu" or not target.numel():
            target.copy_(self.read())
            return
        try:
            data = self.place()
        except OSError:
            target.copy_(self.read())
            return
        target.copy_(tensor_of_bytes(data, self.dtype, self.shape))


def bytes_there(place: SegmentBytes, node: str) -> Any:
    """Bytes of a node's segment, which a task of Ray's reads there.

    Raises:
        CheckpointError: They are gone.
    """
    reader = ray.remote(num_cpus=0, max_retries=0)(SegmentBytes.copied).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), name="raytrainer-read"
    )
    try:
        return ray.get(reader.remote(place))
    except (RayError, OSError) as error:
        raise CheckpointError(f"shards are gone with the processes that had them: {error}") from None
