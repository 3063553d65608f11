"""Tensors of which each worker has a piece: how a state holds them, and how any part of one is put together again.

A state of a sharded module is in two parts. The *tree* is what every state is, dicts and lists, in which a `Mark`
stands for each tensor that is in pieces. The *pieces* are, for each worker, what it has of the tensors, by their keys.
A state in memory has them as tensors, one on a disk as places in files, which are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raytrainer.errors import CheckpointError
from raytrainer.hparams import HYPERPARAMETERS

__all__ = [
    "KEY",
    "InPieces",
    "Mark",
    "Piece",
    "Stored",
    "brought_here",
    "join_pieces",
    "map_tree",
    "places_of",
    "split",
    "whole_state",
]

#: Where a state has its pieces: a list by rank of {key: Piece}.
KEY = "pieces"


class Stored(Protocol):
    """A piece that is somewhere else."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""

    def read(self) -> Tensor:
        """The piece."""

    def read_to(self, target: Tensor) -> None:
        """Put the piece into a tensor of its type and shape, which lies in one piece of memory, on any device."""


@dataclass(frozen=True)
class Mark:
    """Stands for a tensor that is in pieces. `key` is its name among them."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A block of a tensor; in a state it is a dict of these, whose tensors are copied and sent like all others.

    Attributes:
        at: Index of its first element in the whole tensor.
        shape: Its own.
        data: The numbers, or where they are.
    """

    at: tuple[int, ...]
    shape: tuple[int, ...]
    data: Any

    def read(self) -> Tensor:
        data: Tensor = self.data if isinstance(self.data, Tensor) else self.data.read()
        return data

    def read_to(self, target: Tensor) -> None:
        if isinstance(self.data, Tensor):
            target.copy_(self.data)
        else:
            self.data.read_to(target)


class InPieces:
    """A tensor in pieces, of which any block can be had.

    Args:
        mark: What stood for it.
        pieces: All that there are of it, from whatever workers; replicas are allowed.
    """

    def __init__(self, mark: Mark, pieces: Sequence[Piece]) -> None:
        self.key, self.shape, self.dtype = mark.key, torch.Size(mark.shape), mark.dtype
        self._pieces = {piece.at: piece for piece in reversed(pieces) if 0 not in piece.shape or not mark.shape}

    def block(self, at: Sequence[int], shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """The block of this shape whose first element is at `at`: on `device` a copy, which is the caller's own.

        Raises:
            CheckpointError: Pieces are missing.
        """
        whole = self._pieces.get(tuple(at))
        if whole is not None and whole.shape == tuple(shape) and whole.data.dtype == self.dtype:
            if device is None:
                return whole.read()
            found = torch.empty(tuple(shape), dtype=self.dtype, device=device)
            whole.read_to(found)
            return found
        joined = self._joined(at, shape)
        return joined if device is None else joined.to(device)

    def _joined(self, at: Sequence[int], shape: Sequence[int]) -> Tensor:
        found = torch.empty(tuple(shape), dtype=self.dtype)
        left = found.numel()
        for piece in self._pieces.values() if left else ():
            begin = [max(a, b) for a, b in zip(at, piece.at, strict=True)]
            ends = zip(at, shape, piece.at, piece.shape, strict=True)
            end = [min(a + n, b + m) for a, n, b, m in ends]
            if any(b >= e for b, e in zip(begin, end, strict=True)):
                continue
            here = tuple(slice(b - a, e - a) for a, b, e in zip(at, begin, end, strict=True))
            there = tuple(slice(b - a, e - a) for a, b, e in zip(piece.at, begin, end, strict=True))
            part = piece.read()[there]
            found[here] = part
            left -= part.numel()
        if left > 0:
            raise CheckpointError(f"the checkpoint lacks {left} numbers of {self.key!r}; use another checkpoint.")
        return found

    def row_blocks(self) -> list[tuple[int, int]]:
        """The rows (first, one past the last) between which pieces begin, in order: what can be had at a time."""
        if not self.shape:
            return [(0, 1)]
        starts = sorted({piece.at[0] for piece in self._pieces.values()} | {0})
        return list(zip(starts, [*starts[1:], self.shape[0]], strict=True))

    def whole(self) -> Tensor:
        """All of it."""
        return self.block([0] * len(self.shape), self.shape)


def places_of(pieces: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a worker's pieces all but their numbers: "at", "shape", and the numbers' "dtype"."""
    return {
        key: {"at": piece["at"], "shape": piece["shape"], "dtype": piece["data"].dtype} for key, piece in pieces.items()
    }


def map_tree(tree: Any, change: Callable[[Any, str], Any], path: str = "") -> Any:
    """Dicts, lists and tuples with `change(value, path)` in place of everything else in them."""
    if isinstance(tree, Tensor):  # most are; and the next question takes longer
        return change(tree, path)
    if isinstance(tree, Mapping):
        return {key: map_tree(value, change, f"{path}/{key}" if path else str(key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        items = [map_tree(item, change, f"{path}/{index}") for index, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return change(tree, path)


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of a state that may have tensors in pieces, and those that are to stay what they are."""
    plain = {"own", *HYPERPARAMETERS}
    tree = {name: value for name, value in state.items() if name not in plain and name != KEY}
    return tree, {name: value for name, value in state.items() if name in plain}


def join_pieces(state: Mapping[str, Any], change: Callable[[InPieces], Any]) -> dict[str, Any]:
    """A state with `change` of each tensor that is in pieces, and without its pieces; any other state as it is."""
    if KEY not in state:
        return dict(state)
    by_rank: Sequence[Mapping[str, Mapping[str, Any]]] = state[KEY]

    def joined(value: Any, path: str) -> Any:
        if not isinstance(value, Mark):
            return value
        return change(InPieces(value, [Piece(**pieces[value.key]) for pieces in by_rank if value.key in pieces]))

    tree, rest = split(state)
    return {**map_tree(tree, joined), **rest}


def brought_here(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose pieces are in this process."""
    if KEY not in state:
        return dict(state)
    return {**state, KEY: [{k: {**p, "data": Piece(**p).read()} for k, p in held.items()} for held in state[KEY]]}


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose tensors are whole."""
    return join_pieces(state, InPieces.whole)
