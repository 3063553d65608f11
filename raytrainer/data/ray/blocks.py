"""Ray Datasets for training: how blocks get to the workers.

A dataset that is only read and is small enough is read once and stays in the object store (`KeptBlocks`): workers take
rows from shared memory by number, so an epoch starts in milliseconds, in any order, at any batch. Any other is executed
anew in each epoch by an actor that deals its blocks to the workers (`StreamedBlocks`, `Splitter`). That is
`streaming_split`, but for two things it cannot do: drop no row while all workers end together, and depend on (seed,
epoch) alone. With Ray 2.60 and 200 MB of Parquet an epoch's first block came after 1.7-4.4 s with the default reader,
0.2 s with its listing of files done once, and less than 0.01 s where blocks are kept.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from raytrainer.data.ray import spare_splitters
from raytrainer.data.ray.columns import Columns, cut, views
from raytrainer.data.ray.row_order import RowOrder
from raytrainer.data.ray.splitter import Reading, Splitter, SplitterLost

if TYPE_CHECKING:
    from raytrainer.data.ray.ray_dataset import RayDataset
    from raytrainer.data.sharding import Share

__all__ = ["KeptBlocks", "StreamedBlocks", "settings_only"]

log = logging.getLogger("raytrainer")

_sessions = itertools.count()


class KeptBlocks:
    """A dataset whose blocks stay in the object store.

    Attributes:
        source: The dataset's settings.
        refs: References to its blocks.
        rows: Rows of each.
        total: All rows.
    """

    kept: Literal[True] = True

    def __init__(self, source: RayDataset, refs: list[Any], rows: list[int]) -> None:
        self.source, self.refs, self.rows = source, refs, rows
        self.total: int = sum(rows)
        self._chunks: dict[int, list[tuple[Columns, int]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": {}, "source": settings_only(self.source)}

    def renew(self) -> None:
        """Before each sending to a group; nothing to do."""

    def close(self) -> None:
        """At the end of the run: let go of the blocks."""
        self.refs.clear()
        self._chunks.clear()

    def order(self, shuffle: bool | int, seed: int) -> RowOrder:
        """The rows in an order of their own."""
        return RowOrder(self.rows, self._chunks_of, shuffle, seed)

    def _chunks_of(self, block: int) -> list[tuple[Columns, int]]:
        # views of shared memory, so keeping them costs nothing
        if block not in self._chunks:
            self._chunks[block] = _fetch(self.refs[block], self.source)
        return self._chunks[block]


class StreamedBlocks:
    """A dataset that is executed anew in each epoch.

    Attributes:
        source: The dataset's settings.
        total: Its rows, where they are known without executing it.
        splitter: What executes it: an actor, or the object itself where the worker is the driver's process.
        session: Counts groups, over all runs, so that the pieces of one are not handed to another.
    """

    kept: Literal[False] = False

    def __init__(self, source: RayDataset, stage: str, remote: bool) -> None:
        self.source, self.session, self.remote = source, next(_sessions), remote
        self.total: int | None = None
        self._dataset: Any = None
        self._taken: Any = None  # answers when the splitter knows what to execute
        self._settings = settings = stage == "train", source.batch_size, source.drop_last
        self.splitter: Any = spare_splitters.take(*settings, self.session) if remote else Splitter(*settings)

    def take(self, dataset: Any, total: int | None) -> None:
        """Say what is to be executed, and its rows."""
        self.total, self._dataset = total, dataset
        if self.remote:
            self._taken = self.splitter.take.remote(dataset)
        else:
            self.splitter.take(dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": settings_only(self.source), "_dataset": None, "_taken": None}

    def renew(self) -> None:
        """Before each sending to a group: the splitter lives and knows what to execute."""
        import ray
        from ray.exceptions import RayActorError

        self.session = next(_sessions)
        if not self.remote:
            return
        try:
            # calls of several processes have no order: workers might ask before it knows
            ray.get([self._taken, self.splitter.answer.remote()])
        except RayActorError as error:
            log.debug("The process that executes a dataset is lost; there is another one", exc_info=error)
            self.splitter = spare_splitters.new(*self._settings)
            self.take(self._dataset, self.total)
            ray.get(self._taken)

    def close(self) -> None:
        """At the end of the run: end the execution."""
        if not self.remote:
            self.splitter.close()
        elif self.splitter is not None:
            spare_splitters.give_back(self.splitter)
            self.splitter = None

    def pieces(
        self, start: int, share: Share, wanted: Reading
    ) -> Iterator[tuple[Columns, int, tuple[int, int] | None]]:
        """One worker's rows in an epoch: (columns, rows, None), and last ({}, 0, (shortest part, longest part))."""
        ask = (self.session, start), share.index, share.count, wanted
        pending = self._ask(ask)
        block, chunks = None, list[tuple[Columns, int]]()
        while True:
            pieces, ends = self._answer(pending)
            if ends is None:
                pending = self._ask(ask)  # answered while these are being read
            for piece in pieces:
                if piece.block != block:
                    block, chunks = piece.block, _fetch(piece.block, self.source)
                at = 0
                for columns, rows in chunks:
                    first, last = max(piece.start - at, 0), min(piece.stop - at, rows)
                    if first < last:
                        yield cut(columns, first, last), last - first, None
                    at += rows
            if ends is not None:
                yield {}, 0, ends
                return

    def _ask(self, ask: tuple[Any, ...]) -> Any:
        return self.splitter.next.remote(*ask) if self.remote else ask

    def _answer(self, pending: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError

        if not self.remote:
            return self.splitter.next(*pending)
        try:
            return ray.get(pending)
        except RayActorError as error:
            raise SplitterLost(f"the process that executes the dataset is gone: {error}") from error


def _fetch(ref: Any, source: RayDataset) -> list[tuple[Columns, int]]:
    import ray
    from ray.data.block import BlockAccessor

    return views(BlockAccessor.for_block(ray.get(ref)).to_arrow(), source.columns)


def settings_only(source: RayDataset) -> RayDataset:
    """The settings without the dataset, which need not travel."""
    bare = copy.copy(source)
    object.__setattr__(bare, "dataset", None)
    return bare
