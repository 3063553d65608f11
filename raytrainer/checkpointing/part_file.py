"""One worker's file of tensors in pieces, written by whatever process has them; without torch, which costs seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checksums import ChecksummedWriter, FileRecord

__all__ = ["PartPlan", "PartRecord", "write_part"]


@dataclass(frozen=True)
class PartPlan:
    """What a file is to have: a safetensors header, and then the bytes of some pieces.

    Attributes:
        name: Of the file.
        header: Its first bytes.
        keys: Of the pieces, in order.
    """

    name: str
    header: bytes
    keys: Sequence[str]


@dataclass(frozen=True)
class PartRecord:
    """What has been written: the file, and each of its pieces."""

    file: FileRecord
    pieces: Mapping[str, FileRecord]


def write_part(
    folder: CheckpointFolder, plan: PartPlan, data: Mapping[str, Any], given_up: Callable[[], bool] | None = None
) -> PartRecord:
    """Write it, durably.

    Args:
        folder: Where to.
        plan: What.
        data: Each piece's bytes, or what gives them when it is called.
        given_up: Asked now and then, whether to leave it at that.

    Raises:
        CheckpointError: It cannot be written. Nothing of it is left.
    """
    pieces: dict[str, FileRecord] = {}

    def save(file: ChecksummedWriter) -> None:
        file.write(plan.header)
        for key in plan.keys:
            content = data[key]
            content = content() if callable(content) else content
            pieces[key] = file.write_part(content)

    record = folder.write(plan.name, save, given_up)
    return PartRecord(record, pieces)
