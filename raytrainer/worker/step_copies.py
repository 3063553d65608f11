"""What all workers have alike, copied aside step by step; and what a GPU has of a worker's own, on its way home."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytrainer.plan.common_moment import Moment
from raytrainer.private.torch_private import copy_together
from raytrainer.worker.written_tables import Tables

__all__ = ["Arrives", "OnTheWay", "StepCopies", "is_plain"]


def is_plain(value: Any) -> bool:
    """Whether it is a tensor of a place and strides, and no more than that."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.numel() > 0
    return plain and not value.is_neg() and not value.is_conj()


class StepCopies:
    """Tensors as they were at the last few moments. A GPU's are copied when its work has come to that.

    Args:
        kept: Of how many moments.
        room: Bytes for all of them, on each device but the CPU; None: as many as there are.
    """

    def __init__(self, kept: int, room: int | None = None) -> None:
        self._kept, self._room = kept, room
        self._kinds: list[Any] = []  # of the latest copies, as for each of them in `_like`
        self._like: list[Any] = [None] * kept
        self._tensors: list[dict[str, Tensor]] = [{} for _ in range(kept)]
        self._moments: list[Moment | None] = [None] * kept

    def begin(self, turn: int, live: dict[str, Tensor]) -> bool:
        """Copy, in place of what was copied longest ago; whether there is room."""
        place = turn % self._kept
        self._moments[place] = None  # what fails midway is of no moment
        kinds = [(name, tensor.dtype, tensor.shape, tensor.device) for name, tensor in live.items()]
        if kinds != self._kinds:
            size = sum(t.numel() * t.element_size() for t in live.values() if t.device.type != "cpu")
            if self._room is not None and self._kept * size > self._room:
                return False
            self._kinds = kinds
        copies = self._tensors[place]
        if self._like[place] is not self._kinds:
            self._like[place] = None
            copies.clear()  # first: there may not be room for both
            copies.update({name: torch.empty_like(t, requires_grad=False) for name, t in live.items()})
            self._like[place] = self._kinds
        with torch.no_grad():
            copy_together([copies[name] for name in live], [tensor.detach() for tensor in live.values()])
        return True

    def complete(self, turn: int, moment: Moment) -> None:
        """What was begun then is there."""
        self._moments[turn % self._kept] = moment

    def moments(self) -> list[Moment]:
        """Those of which there are complete copies."""
        return [moment for moment in self._moments if moment is not None]

    def of(self, moment: Moment) -> dict[str, Tensor]:
        """The tensors as they were then, in main memory."""
        return {name: tensor.cpu() for name, tensor in self._tensors[self._moments.index(moment)].items()}

    def drop(self) -> None:
        """Give the memory back."""
        self._tensors, self._moments = [{} for _ in range(self._kept)], [None] * self._kept
        self._like = [None] * self._kept


@dataclass(frozen=True)
class Arrives:
    """Stands for a tensor on its way, by its number."""

    index: int


class OnTheWay:
    """Tensors of a device that are copied to main memory together, as they are now, and without waiting for it."""

    def __init__(self) -> None:
        self._live: list[Tensor] = []
        self._parts: list[tuple[list[int], Tensor]] = []
        self._shapes: list[torch.Size] = []
        self._expected: list[tuple[Arrives, list[int]]] = []

    def add(self, tensor: Tensor) -> Arrives:
        """One more, before `begin`."""
        self._live.append(tensor.detach())
        return Arrives(len(self._live) - 1)

    @contextmanager
    def proving(self, tables: Tables) -> Iterator[None]:
        """Whoever asks these tables meanwhile does not wait for the device, which says later whether it was right."""
        with tables.proving_later() as unproven:
            yield
        self._expected += [(self.add(each.said), each.expected) for each in unproven]

    def begin(self) -> None:
        """Have them copied."""
        groups: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(self._live):
            groups.setdefault(tensor.dtype, []).append(index)
        for dtype, indices in groups.items():
            flat = torch.cat([self._live[index].reshape(-1) for index in indices])
            host = torch.empty(flat.shape, dtype=dtype, pin_memory=flat.is_cuda)
            self._parts.append((indices, host.copy_(flat, non_blocking=True)))
        self._shapes, self._live = [tensor.shape for tensor in self._live], []

    def arrived(self) -> list[Tensor]:
        """They, once the device has come to that point."""
        found = dict[int, Tensor]()
        for indices, flat in self._parts:
            sizes = [self._shapes[index].numel() for index in indices]
            found |= zip(indices, flat.split(sizes), strict=True)
        return [found[index].view(shape) for index, shape in enumerate(self._shapes)]

    def proves(self, arrived: Sequence[Tensor]) -> bool:
        """Whether those tables are unchanged, by what has arrived."""
        return all(arrived[at.index].tolist() == expected for at, expected in self._expected)
