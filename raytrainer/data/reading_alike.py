"""Reading in this process with generators that depend on (seed, epoch, batch), not on what was drawn before.

And whether a loader of the user's gives its batches in the order in which it has asked for them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from raytrainer.data.first_batches import leaves
from raytrainer.data.held_objects import STREAMS, library_of
from raytrainer.data.look_ahead import END
from raytrainer.data.sharding import ShardedBatches
from raytrainer.private.torch_private import Given
from raytrainer.seeding import host_generators

__all__ = ["Order", "begun_alike", "read_again", "read_alike"]

log = logging.getLogger("raytrainer")

TOO_LATE = (
    "%s gives other batches than it reads (it leaves some out, or changes their order), which was not known yet when "
    "this epoch went on at batch %d. If what it does depends on where it begins, the rest of this epoch is not what an "
    "undisturbed run reads; later epochs are. Give it state_dict and load_state_dict, or do this in a sampler."
)


def read_again(loader: Any, reader: DataLoader[Any] | None) -> bool:
    """Whether an iterable without a state is read in this process: a resumed run then reads the epoch again.

    What is drawn for it must be the same then.

    Args:
        loader: What is iterated.
        reader: The DataLoader that reads for it, if any does.
    """
    if reader is None:
        return not isinstance(loader, (list, tuple))
    return not reader.num_workers and library_of(reader.dataset) not in STREAMS


def read_alike(iterate: Callable[[], Iterator[Any]], seed: Callable[[int], int], begin: int) -> Iterator[Any]:
    """Batches, each read with generators of its own, which leaves those of the training (dropout) as they are.

    Args:
        iterate: Begins to read.
        seed: Of a batch, by its number.
        begin: The first one's number.
    """
    iterator: Iterator[Any] | None = None
    for position in itertools.count(begin):
        with host_generators(seed(position)):
            if iterator is None:
                iterator = iterate()
            batch = next(iterator, END)
        if batch is END:
            return
        yield batch


def begun_alike(iterate: Callable[[], Iterator[Any]], seed: int) -> Iterator[Any]:
    """Batches, of which the first is read with generators of its own.

    It is then that streams draw their order. Where each worker takes its part of that, all must draw the same.
    """
    with host_generators(seed):
        iterator = iterate()
        first = next(iterator, END)
    if first is not END:
        yield first
        yield from iterator


class Order:
    """Watches whether a loader gives one batch for each that it has read, in their order.

    One that does not (it shuffles batches, or leaves some out) cannot be resumed by leaving out what was read first.
    Threads of the user's that read are taken to keep the order.

    Args:
        loader: The loader.
        reader: Its own part, or the loader that it wraps; this changes it.
        batches: What decides on its batches.

    Attributes:
        kept: Whether it has, as far as can be told.
    """

    def __init__(self, loader: Any, reader: DataLoader[Any], batches: ShardedBatches) -> None:
        self.name, self.batches, self.kept = type(loader).__name__, batches, True
        self._given = Given(reader)
        self._reads_ahead = False  # for certain

    def watched(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The same batches, of one pass."""
        batches, ahead = self.batches, None
        begun = batches.skip
        try:
            total = len(batches)
        except (TypeError, NotImplementedError):
            total = None
        for given, batch in enumerate(iterator, 1):
            read = self._given.count()
            read = read if read is None or total is None else min(read, total)
            if read is not None and batches.asked_in == threading.get_ident():
                if ahead is None:
                    ahead = read - given
                    if ahead == 1 and not self._reads_ahead:
                        self._reads_ahead = _is_first(batch, self._given.first)
                        ahead += not self._reads_ahead  # it has left out the first
                    self._given.first = []
                expected = given + ahead if total is None else min(given + ahead, total)
                if self.kept and (not 0 <= ahead <= 1 or read != expected):
                    self.kept = False
                    if begun:
                        log.warning(TOO_LATE, self.name, begun)
            yield batch


def _is_first(batch: Any, read: list[Any]) -> bool:
    """Whether a batch that a loader gives is made of the first of two that it has read, as far as can be told."""
    if any(batch is one for one in read[:1]) or len(read) < 2:
        return True
    first, second, given = ({zlib.crc32(repr(leaf).encode()) for _, leaf in leaves(one)} for one in (*read, batch))
    return not given.isdisjoint(first - second)
