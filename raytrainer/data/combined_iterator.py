"""`CombinedIterator`: one epoch's batches of several loaders, each read by its own feed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from raytrainer.data.combined_loader import CombinedLoader
from raytrainer.data.look_ahead import LookAhead
from raytrainer.errors import DataError

__all__ = ["CombinedIterator", "Track"]


class OneFeed(Protocol):
    """A `Feed`, or a `CombinedFeed` in another one.

    Attributes:
        source: The loader.
        length: Batches to read in this epoch; None: until it ends.
    """

    source: Any
    length: int | None

    def start(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """Batches of an epoch, from batch `skip` on."""


class Track:
    """Where one loader is: in which pass, and how many batches of it have been read.

    Args:
        feed: Of the loader.
        of_pass: The epoch that a pass of this epoch is to the loader.
    """

    def __init__(self, feed: OneFeed, of_pass: Callable[[int], int]) -> None:
        self.feed, self.of_pass = feed, of_pass
        self.at = self.read = 0
        self.ended = False  # known from before
        self.iterator: Iterator[Any] | None = None

    def place(self, at: int, read: int, over: bool = False) -> None:
        self.at, self.read, self.ended, self.iterator = at, read, over, None

    @property
    def begun(self) -> bool:
        return self.ended or self.iterator is not None

    def started(self) -> Iterator[Any]:
        if self.iterator is None:
            self.iterator = self.feed.start(self.of_pass(self.at), self.read)
        return self.iterator

    @property
    def over(self) -> bool:
        """Whether the pass has no batch left."""
        length = self.feed.length
        if self.ended or (length is not None and self.read >= length):
            return True
        iterator = self.started()
        return isinstance(iterator, LookAhead) and iterator.is_last

    def next(self, keeping: bool) -> Any:
        iterator = self.started()
        if isinstance(iterator, LookAhead):
            iterator.keeping = keeping
        batch = next(iterator)
        self.read += 1
        return batch

    def again(self) -> None:
        """Begin the next pass."""
        self.place(self.at + 1, 0)


class CombinedIterator(LookAhead):
    """Batches of a combination. Reads none ahead of its own: each loader knows whether it is at its end."""

    def __init__(
        self, loader: CombinedLoader, tracks: list[Track], agree: Callable[[bool], bool] | None, handed: int
    ) -> None:
        self.loader, self.tracks, self.agree, self.handed = loader, tracks, agree, handed
        self.keep, self.keeping, self.leaves = None, False, False
        self._more = self._look()
        for track in tracks if self._more and loader.mode != "sequential" else ():
            if not track.over:  # now, while what replaying draws leaves no trace
                track.started()

    def _look(self) -> bool:
        """Whether there is another batch, for all workers."""
        over = [track.over for track in self.tracks] if self.loader.mode != "sequential" else []
        mode = self.loader.mode
        if mode == "min_size":
            more = not any(over)
        elif mode == "max_size":
            more = not all(over)
        elif mode == "max_size_cycle":
            more = any(track.at == 0 and not done for track, done in zip(self.tracks, over, strict=True))
        else:
            more = not all(track.over for track in self.tracks)
        self.ended = not more
        agreed = more if self.agree is None else self.agree(more)
        self.leaves = more and not agreed
        return agreed

    @property
    def is_last(self) -> bool:
        return not self._more

    def __next__(self) -> Any:
        if not self._more:
            raise StopIteration
        self.handed += 1
        batch = self._read_one() if self.loader.mode == "sequential" else self.loader.form(self._read_all())
        self._more = self._look()
        return batch

    def _read_one(self) -> Any:
        return next(track for track in self.tracks if not track.over).next(self.keeping)

    def _read_all(self) -> list[Any]:
        batches = []
        for track in self.tracks:
            if track.over and self.loader.mode == "max_size_cycle":
                track.again()
                if track.over:
                    raise DataError(
                        f"a loader of a CombinedLoader ({type(track.feed.source).__name__}) gave nothing when read "
                        f"again: with 'max_size_cycle' a short loader begins anew, so its __iter__ must start anew."
                    )
            batches.append(None if track.over else track.next(self.keeping))
        return batches
