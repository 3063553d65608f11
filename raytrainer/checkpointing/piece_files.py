"""Tensors in pieces on a disk: a safetensors file for each worker, and an index of who has which block of what.

    rank<n>-<id>.safetensors   what worker n has given, but for blocks that an earlier one has given too
    pieces-<id>.json           for each tensor its blocks: file, first byte, size, checksum, place in the whole

A reader that needs some blocks reads these alone, and checks what it has read.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raytrainer.checkpointing.checked_reader import check_file, checked_pieces
from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checksums import FileRecord
from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.part_file import PartPlan, write_part
from raytrainer.checkpointing.pieces import KEY, Mark, map_tree, split
from raytrainer.checkpointing.pieces_elsewhere import PiecesElsewhere
from raytrainer.checkpointing.places import folder_at
from raytrainer.checkpointing.safetensors_files import DTYPES, NAMES
from raytrainer.errors import CheckpointError

__all__ = ["StoredPiece", "brought_along", "read_pieces", "write_pieces"]

_MARK = "__in_pieces__"


@dataclass(frozen=True)
class StoredPiece:
    """A block of a tensor in a file of a checkpoint.

    Attributes:
        checkpoint: Path or URI.
        file: Its file there.
        begin: Its first byte in the file.
        record: Size and checksum of its bytes.
        dtype: Of its numbers.
        shape: Its own.
    """

    checkpoint: str
    file: str
    begin: int
    record: FileRecord
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The block. Raises what `read_to` does."""
        data = torch.empty(self.shape, dtype=self.dtype)
        self.read_to(data)
        return data

    def read_to(self, target: Tensor) -> None:
        """Read the block to where it belongs: into main memory at once, to a GPU by way of a few bytes there.

        Raises:
            CheckpointError: The file is missing, or not what was written.
        """
        folder = folder_at(self.checkpoint)
        shown = f"{self.checkpoint}/{self.file}"
        room = target.reshape(-1).view(torch.uint8)
        try:
            with folder.storage.open(folder.inside(self.file)) as file:
                file.seek(self.begin)
                if target.device.type == "cpu":
                    check_file(file, self.record, shown, room.numpy().data)
                else:
                    _read_across(file, self.record, shown, room)
        except FileNotFoundError:
            raise CheckpointError(f"{shown}: the file is missing; use another checkpoint.") from None
        except OSError as error:
            raise CheckpointError(f"{shown}: the file cannot be read: {error}") from error


def _read_across(file: BinaryIO, record: FileRecord, name: str, room: Tensor) -> None:
    """Read to another device. The same few bytes of main memory serve for all, as fresh ones take time to come."""
    done = 0
    for piece in checked_pieces(file, record, name):
        room[done : done + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))
        done += len(piece)


def write_pieces(new: NewCheckpoint, state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Write a state's pieces; those that are elsewhere are written where they are.

    Returns:
        The state without them, its marks as plain values, and the name of the index.
    """
    by_rank: Sequence[Mapping[str, Mapping[str, Any]]] = state[KEY]
    given: set[tuple[str, tuple[int, ...]]] = set()
    plans: dict[int, PartPlan] = {}
    for rank, pieces in enumerate(by_rank):
        own = {k: p for k, p in pieces.items() if 0 not in p["shape"] and (k, tuple(p["at"])) not in given}
        given |= {(key, tuple(piece["at"])) for key, piece in own.items()}
        if own:
            plans[rank] = PartPlan(f"rank{rank}-{new.id}.safetensors", _header(own), list(own))
    for plan in plans.values():
        new.expect(plan.name)
    if isinstance(by_rank, PiecesElsewhere):
        records = by_rank.write(new, plans)
    else:
        records = {
            rank: write_part(new.folder, plan, _bytes_of(by_rank[rank]), new.given_up) for rank, plan in plans.items()
        }
    for rank, record in records.items():
        new.take(plans[rank].name, record.file)
    index: dict[str, list[dict[str, Any]]] = {}
    for rank, plan in plans.items():
        begin = len(plan.header)
        for key in plan.keys:
            piece, written = by_rank[rank][key], records[rank].pieces[key]
            entry = {
                "at": list(piece["at"]), "shape": list(piece["shape"]), "dtype": NAMES[piece["data"].dtype],
                "file": plan.name, "begin": begin, **written.as_json(),
            }  # fmt: skip
            index.setdefault(key, []).append(entry)
            begin += written.bytes
    name = f"pieces-{new.id}.json"
    new.write(name, lambda file: file.write(json.dumps(index).encode()))
    tree, rest = split(state)
    return map_tree(tree, _plain_mark) | rest, name


def _plain_mark(value: Any, path: str) -> Any:
    return {_MARK: value.key, "shape": list(value.shape), "dtype": value.dtype} if isinstance(value, Mark) else value


def _header(pieces: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The first bytes of a safetensors file of these pieces, its length included."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, piece in pieces.items():
        dtype = piece["data"].dtype
        if dtype not in NAMES:
            raise CheckpointError(f"checkpoint entry {key} is of {dtype}, which cannot be saved in shards.")
        end = begin + math.prod(piece["shape"]) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(piece["shape"]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(pieces: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What gives each piece's bytes."""

    def content(data: Any) -> Any:
        tensor: Tensor = data if isinstance(data, Tensor) else data.read()
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return {key: partial(content, piece["data"]) for key, piece in pieces.items()}


def read_pieces(
    folder: CheckpointFolder, name: str, files: Mapping[str, FileRecord], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The reverse of `write_pieces`; nothing but the index, one of the `files`, is read until a piece is asked for.

    Raises:
        CheckpointError: The index is missing, or not what was written; or it does not fit the state, or the files.
    """
    with folder.open(name, files[name]) as file:
        content = file.read()
    by_rank: dict[str, dict[str, Any]] = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    try:
        index: dict[str, list[dict[str, Any]]] = json.loads(content)
        for key, entries in index.items():
            for entry in entries:
                stored, at = _stored(entry, folder, files)
                by_rank.setdefault(stored.file, {})[key] = {"at": at, "shape": stored.shape, "data": stored}
                shapes.setdefault(key, []).append(stored.shape)
        return {**_with_marks(state, shapes), KEY: list(by_rank.values())}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.shown}/{name}: this is not what raytrainer has written there ({type(error).__name__}: {error}); "
            f"use another checkpoint."
        ) from None


def _stored(
    entry: Mapping[str, Any], folder: CheckpointFolder, files: Mapping[str, FileRecord]
) -> tuple[StoredPiece, tuple[int, ...]]:
    """What an entry of the index stands for, and where it begins in the whole; errors of any kind if for nothing."""
    dtype, shape, at, begin = DTYPES[entry["dtype"]], _counts(entry["shape"]), _counts(entry["at"]), entry["begin"]
    record = FileRecord.from_json({"bytes": entry["bytes"], "checksum": entry["checksum"]})
    _counts([begin])
    if record is None or len(at) != len(shape) or record.bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a block of {len(shape)} dimensions")
    if begin + record.bytes > files[entry["file"]].bytes:
        raise ValueError(f"a block beyond the end of {entry['file']}")
    return StoredPiece(folder.shown, entry["file"], begin, record, dtype, shape), at


def _counts(numbers: Sequence[Any]) -> tuple[int, ...]:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{str(numbers)[:80]} where numbers of rows are expected")
    return tuple(numbers)


def brought_along(state: Any, hosts: Sequence[str]) -> Any:
    """A state for processes on these hosts: what only this machine can read is read, if some are on others."""
    if isinstance(state, dict) and isinstance(state.get(KEY), PiecesElsewhere):
        return {**state, KEY: list(state[KEY])}  # they may read them as this process does
    if not isinstance(state, dict) or KEY not in state or set(hosts) == {socket.gethostname()}:
        return state

    def here(value: Any, path: str) -> Any:
        return value.read() if isinstance(value, StoredPiece) and "://" not in value.checkpoint else value

    return {**state, KEY: [map_tree(pieces, here) for pieces in state[KEY]]}


def _with_marks(tree: Any, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> Any:
    """A state with its marks, each of which stands for no more than what the blocks of these shapes can be."""
    if isinstance(tree, dict):
        if _MARK in tree:
            mark = Mark(tree[_MARK], _counts(tree["shape"]), tree["dtype"])
            blocks = shapes.get(mark.key, [])
            if not isinstance(mark.dtype, torch.dtype) or any(len(block) != len(mark.shape) for block in blocks):
                raise ValueError(f"blocks of other dimensions than {mark.key!r} has")
            if math.prod(mark.shape) > sum(map(math.prod, blocks)):
                raise ValueError(f"blocks of {mark.key!r} are missing")
            return mark
        return {key: _with_marks(value, shapes) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        items = [_with_marks(item, shapes) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree
