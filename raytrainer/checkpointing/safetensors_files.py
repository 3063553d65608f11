"""Weights in safetensors files, as models are handed on: one, or several with an index. Any block is read alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from raytrainer.checkpointing.places import folder_at, is_file, locate
from raytrainer.errors import CheckpointError

__all__ = ["DTYPES", "NAMES", "SafetensorsFiles"]

#: The format's names of types.
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file, from its byte `begin` on."""

    file: str
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The tensors in a file, or in all files of a folder. What they are is read at once, their numbers when asked for.

    Args:
        path: Path or URI of a file, or of a folder.

    Attributes:
        shapes: Each tensor's shape, by its name.

    Raises:
        CheckpointError: There are none, or one is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shown = os.fspath(path)
        filesystem, inner = locate(self._shown)
        if is_file(filesystem, inner):
            self._folder = folder_at(self._shown.rpartition("/")[0] or ".")
            names = [os.path.basename(inner)]
        else:
            self._folder = folder_at(self._shown)
            names = sorted(name for name in self._folder.storage.files(inner) if name.endswith(".safetensors"))
        if not names:
            raise CheckpointError(f"{self._shown}: there is no safetensors file.")
        self._entries: dict[str, _Entry] = {}
        for name in names:
            with self._open(name) as file:
                self._entries |= _entries(file, name, f"{self._folder.shown}/{name}")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, at: Sequence[int] = (), shape: Sequence[int] | None = None) -> Tensor:
        """A block of a tensor, in main memory: of this shape, from the element `at` on; without these, all of it.

        Of a block's rows no others are read.

        Raises:
            CheckpointError: The file ends before.
        """
        entry = self._entries[name]
        at, shape = tuple(at) or (0,) * len(entry.shape), entry.shape if shape is None else tuple(shape)
        if 0 in shape:
            return torch.empty(shape, dtype=entry.dtype)
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        first, rows = (at[0], shape[0]) if shape else (0, 1)
        data = bytearray(rows * row)
        with self._open(entry.file) as file:
            file.seek(entry.begin + first * row)
            _fill(file, data, f"{self._folder.shown}/{entry.file}")
        block = torch.frombuffer(data, dtype=entry.dtype).view((rows, *entry.shape[1:]) if shape else ())
        return block[(slice(None), *(slice(a, a + n) for a, n in zip(at[1:], shape[1:], strict=True)))] if at else block

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._folder.storage.open(self._folder.inside(name))
        except OSError as error:
            raise CheckpointError(f"{self._folder.shown}/{name}: the file cannot be read: {error}") from error


def _entries(file: BinaryIO, name: str, shown: str) -> dict[str, _Entry]:
    """What is in a file, as its head says."""
    size = bytearray(8)
    _fill(file, size, shown)
    length = int.from_bytes(size, "little")
    if length > 10**8:
        raise CheckpointError(f"{shown}: this is no safetensors file.")
    head = bytearray(length)
    _fill(file, head, shown)
    try:
        found = {
            key: _Entry(name, 8 + length + int(value["data_offsets"][0]), DTYPES[value["dtype"]], tuple(value["shape"]))
            for key, value in json.loads(head).items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shown}: this is no safetensors file: {error!r}.") from None
    return found


def _fill(file: BinaryIO, data: bytearray, shown: str) -> None:
    """Read as many bytes as `data` has."""
    view, done = memoryview(data), 0
    while done < len(data):
        part = file.read(min(len(data) - done, 2**26))
        if not part:
            raise CheckpointError(f"{shown}: the file ends before its tensors do: it is damaged, or not all there.")
        view[done : done + len(part)] = part
        done += len(part)
