"""`RowOrder`: rows of blocks in shared memory, read by number in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from raytrainer.data.ray.columns import Columns, cut, joined, picked, selected

__all__ = ["RowOrder"]


class RowOrder:
    """The rows of blocks in memory, in an order of their own.

    Args:
        rows: Rows of each block.
        chunks: The columns of a block, chunk by chunk; called when first needed.
        shuffle: As in `RayDataset`.
        seed: Of this epoch's order.
    """

    def __init__(
        self, rows: list[int], chunks: Callable[[int], list[tuple[Columns, int]]], shuffle: bool | int, seed: int
    ) -> None:
        self.chunks = chunks
        self.starts = [0]
        for count in rows:
            self.starts.append(self.starts[-1] + count)
        self._bounds = torch.tensor(self.starts)
        self._scratch: dict[str, Tensor] = {}
        self.order = None if shuffle is False else _order(self.starts, shuffle, seed)

    def sample(self) -> tuple[Columns, int]:
        """Columns of one chunk, and its rows."""
        return next(chunk for i in range(len(self.starts) - 1) for chunk in self.chunks(i))

    def read(self, spans: list[tuple[int, int]]) -> Columns:
        """The rows of these spans, copied."""
        if self.order is not None:
            return self._gathered(torch.cat([self.order[start:stop] for start, stop in spans]))
        return joined([part for start, stop in spans for part in self._between(start, stop)])

    def _between(self, start: int, stop: int) -> Iterator[Columns]:
        block = int(torch.searchsorted(self._bounds, start, right=True)) - 1
        while start < stop:
            at = self.starts[block]
            for columns, rows in self.chunks(block):
                if start < min(at + rows, stop):
                    end = min(at + rows, stop)
                    yield cut(columns, start - at, end - at)
                    start = end
                at += rows
            block += 1

    def _gathered(self, numbers: Tensor) -> Columns:
        """Rows by number: fetched in the order of memory, then put into theirs."""
        ascending, places = numbers.sort()
        edges = torch.searchsorted(ascending, self._bounds).tolist()
        places = torch.empty_like(places).scatter_(0, places, torch.arange(len(places)))
        parts: list[tuple[Columns, Tensor]] = []
        for block in range(len(self.starts) - 1):
            here = ascending[edges[block] : edges[block + 1]] - self.starts[block]
            done = at = 0
            for columns, rows in self.chunks(block) if len(here) else []:
                stop = int(torch.searchsorted(here, at + rows)) if at + rows <= int(here[-1]) else len(here)
                if stop > done:
                    parts.append((columns, here[done:stop] - at))
                done, at = stop, at + rows
        return {name: picked({name: self._collected(name, parts, len(numbers))}, places)[name] for name in parts[0][0]}

    def _collected(self, name: str, parts: list[tuple[Columns, Tensor]], rows: int) -> Any:
        """One column of all parts; of tensors, in memory that is used again, since fresh memory costs as much again."""
        first = parts[0][0][name]
        kinds = {(c[name].dtype, c[name].shape[1:]) if isinstance(c[name], Tensor) else None for c, _ in parts}
        if len(kinds) > 1 or None in kinds:
            return joined([picked({name: c[name]}, wanted) for c, wanted in parts], copy=False)[name]
        scratch = self._scratch.get(name)
        if scratch is None or len(scratch) < rows or scratch.dtype != first.dtype:
            scratch = self._scratch[name] = first.new_empty((rows, *first.shape[1:]))
        at = 0
        for columns, wanted in parts:
            selected(columns[name], wanted, scratch[at : at + len(wanted)])
            at += len(wanted)
        return scratch[:rows]


def _order(starts: list[int], shuffle: bool | int, seed: int) -> Tensor:
    """All row numbers, shuffled: as a whole, or in windows over blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    total = starts[-1]
    if shuffle is True:
        return torch.randperm(total, generator=generator)
    blocks = torch.randperm(len(starts) - 1, generator=generator).tolist()
    order = torch.cat([torch.arange(starts[block], starts[block + 1]) for block in blocks])
    for start in range(0, total, shuffle):
        window = order[start : start + shuffle]
        order[start : start + shuffle] = window[torch.randperm(len(window), generator=generator)]
    return order
