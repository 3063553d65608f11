"""A checkpoint's weights as other programs read them: safetensors files of a bounded size, with an index.

What is read is compared with its checksums by `checkpoint_files.py`, shards by `piece_files.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.checkpointing.exported_file import INDEX, put_in_place
from raytrainer.checkpointing.pieces import InPieces, join_pieces
from raytrainer.checkpointing.places import CheckpointPath
from raytrainer.checkpointing.safetensors_files import NAMES
from raytrainer.errors import CheckpointError
from raytrainer.plan.given_arguments import answers
from raytrainer.plan.uris import absolute

__all__ = ["export_weights"]

_ONE = "model.safetensors"
_INDEX = _ONE + INDEX
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@answers
def export_weights(
    ckpt_path: CheckpointPath,
    folder: str | os.PathLike[str],
    names: Callable[[str], str | None] | None = None,
    dtype: torch.dtype | None = None,
    max_file_size: int | str = "5GB",
) -> None:
    """Write a checkpoint's weights as `transformers` and others read them: safetensors, several files with an index.

    Of a checkpoint in shards no more than one piece of a tensor is in memory at a time. Neither the module nor workers
    are needed.

    Args:
        ckpt_path: The checkpoint.
        folder: A local folder, which is made if need be: "model.safetensors", or "model-00001-of-00003.safetensors" and
            so on with "model.safetensors.index.json". Those of an earlier export are replaced once all the new ones are
            whole, and no such file or index is left that a reader would look for first.
        names: What a tensor is called there, by its name in the module; None: it is left out. Without: all, the same.
        dtype: Convert floating-point tensors. None: as they are.
        max_file_size: Bytes of tensors in a file, or such as "5GB". A larger tensor has a file of its own.

    Raises:
        CheckpointError: There is no whole checkpoint, two tensors get one name, or something cannot be written.
    """
    limit = _size(max_file_size)
    state = join_pieces(read_checkpoint(ckpt_path, lazily=True), lambda tensor: tensor)["state_dict"]
    tensors = _renamed(state, names)
    files: list[dict[str, Any]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * _type(tensor, dtype).itemsize
        if files[-1] and held + size > limit:
            files.append({})
            held = 0
        files[-1][name] = tensor
        held += size
    where = Path(absolute(os.fspath(folder)))
    where.mkdir(parents=True, exist_ok=True)
    several = len(files) > 1
    places: dict[str, str] = {}
    writers: dict[Path, Callable[[str], object]] = {}
    for number, members in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors" if several else _ONE
        places |= dict.fromkeys(members, file)
        writers[where / file] = lambda new, members=members: _write(new, members, dtype)  # type: ignore[misc]
    if several:
        total = sum(math.prod(t.shape) * _type(t, dtype).itemsize for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        writers[where / _INDEX] = lambda new: Path(new).write_text(json.dumps(index, indent=2, sort_keys=True))
    put_in_place(writers, former=[where / (_ONE if several else _INDEX)])


def _size(size: int | str) -> int:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)B?\s*", str(size).upper())
    bytes_ = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if bytes_ <= 0:
        raise CheckpointError(f'export_weights: max_file_size={size!r}: give bytes, or such as "5GB".')
    return bytes_


def _renamed(state: Mapping[str, Any], names: Callable[[str], str | None] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for own, tensor in state.items():
        name = own if names is None else names(own)
        if name is None or not isinstance(tensor, (Tensor, InPieces)):
            continue
        if name in found:
            raise CheckpointError(f"export_weights: names gives {name!r} to {own!r} and to another tensor.")
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"export_weights: {own!r} is of {tensor.dtype}, which safetensors files do not have.")
        found[name] = tensor
    if not found:
        raise CheckpointError("export_weights: no tensor is left to write.")
    return found


def _type(tensor: Any, dtype: torch.dtype | None) -> torch.dtype:
    own: torch.dtype = tensor.dtype
    return dtype if dtype is not None and own.is_floating_point else own


def _write(path: str, tensors: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        kind = _type(tensor, dtype)
        end = begin + math.prod(tensor.shape) * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for part in _rows(tensor):
                _put(file, part.to(_type(part, dtype)))


def _rows(tensor: Any) -> Iterator[Tensor]:
    """A tensor, some rows at a time."""
    if isinstance(tensor, Tensor):
        yield tensor
        return
    for first, last in tensor.row_blocks():
        at = (first, *(0 for _ in tensor.shape[1:]))
        yield tensor.block(at, (last - first, *tensor.shape[1:])) if tensor.shape else tensor.whole()


def _put(file: BinaryIO, part: Tensor) -> None:
    if part.numel():
        file.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
