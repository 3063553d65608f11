"""Ray Datasets for training: what the driver prepares, and how blocks get from there to the workers.

A dataset that is only read and is small enough is read once and stays in the object store (`KeptBlocks`): workers take
rows from shared memory by number, so an epoch starts in milliseconds, in any order, at any batch. Any other is executed
anew in each epoch by an actor that deals its blocks to the workers (`StreamedBlocks`, `Splitter`). That is
`streaming_split`, but for two things it cannot do: drop no row while all workers end together, and depend on (seed,
epoch) alone. With Ray 2.60 and 200 MB of Parquet an epoch's first block came after 1.7-4.4 s with the default reader,
0.2 s with its listing of files done once, and less than 0.01 s where blocks are kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from raytrainer.data.ray import prepared, spare_splitters
from raytrainer.data.ray.columns import Columns, advice, cut, views
from raytrainer.data.ray.row_order import RowOrder
from raytrainer.data.ray.splitter import Reading, Splitter
from raytrainer.errors import ResourceError
from raytrainer.private import ray_private

if TYPE_CHECKING:
    from raytrainer.data.ray.ray_dataset import RayDataset
    from raytrainer.data.sharding import Share

__all__ = ["KeptBlocks", "StreamedBlocks", "is_materialized", "prepare", "require_free_cpu", "settings_only"]

log = logging.getLogger("raytrainer")

#: Share of a node's object store that datasets may take which nobody asked to keep.
KEEP_SHARE = 0.3

#: Operators that give the same rows in every epoch, so that keeping those changes nothing.
_ONLY_READ = {"Read", "ReadFiles", "ListFiles", "InputData", "Project", "Limit", "Union"}
_ONLY_READ |= {"FromItems", "FromBlocks", "FromNumpy", "FromArrow", "FromPandas"}


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
        session: Counts groups, so that the pieces of one are not handed to the next.
    """

    kept: Literal[False] = False

    def __init__(self, source: RayDataset, stage: str, remote: bool) -> None:
        self.source, self.session, self.remote = source, 0, remote
        self.total: int | None = None
        self._taken: Any = None  # answers when the splitter knows what to execute
        self.splitter: Any = None
        settings = stage == "train", source.batch_size, source.drop_last
        self.splitter = spare_splitters.take(*settings) if remote else Splitter(*settings)

    def take(self, dataset: Any, total: int | None) -> None:
        """Say what is to be executed, and its rows."""
        self.total = total
        if self.remote:
            self._taken = self.splitter.take.remote(dataset)
        else:
            self.splitter.take(dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": settings_only(self.source), "_taken": None}

    def renew(self) -> None:
        """Before each sending to a group."""
        import ray

        self.session += 1
        if self._taken is not None:
            ray.get(self._taken)  # calls of several processes have no order: workers might ask before it knows

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

        return ray.get(pending) if self.remote else self.splitter.next(*pending)


def _fetch(ref: Any, source: RayDataset) -> list[tuple[Columns, int]]:
    import ray
    from ray.data.block import BlockAccessor

    return views(BlockAccessor.for_block(ray.get(ref)).to_arrow(), source.columns)


def settings_only(source: RayDataset) -> RayDataset:
    """The settings without the dataset, which need not travel."""
    bare = copy.copy(source)
    object.__setattr__(bare, "dataset", None)
    return bare


# ---------------------------------------------------------------- on the driver


def is_materialized(source: RayDataset) -> bool:
    """Whether the dataset's blocks exist already, so that no task is needed to read it."""
    from ray.data.dataset import MaterializedDataset

    return isinstance(source.dataset, MaterializedDataset)


def prepare(source: RayDataset, stage: str, remote: bool, taken: int = 0) -> tuple[KeptBlocks | StreamedBlocks, int]:
    """Read a dataset into the object store, or make ready to execute it in each epoch.

    Args:
        source: The dataset and its settings.
        stage: "train", "val" or "test".
        remote: Whether workers are actors.
        taken: Bytes that other datasets of the run take.

    Returns:
        What workers read from, and the bytes it takes.
    """
    dataset = source.dataset
    if is_materialized(source):
        _advise(stage, dataset.schema())
        return _kept(source, dataset), 0
    with _in_order(dataset):
        return _prepare(source, dataset, stage, remote, taken)


@contextmanager
def _in_order(dataset: Any) -> Iterator[None]:
    """Have blocks come in the order of the files, rather than as they are ready: the same rows for the same seed."""
    options = dataset.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        yield
    finally:
        options.preserve_order = before


def _prepare(
    source: RayDataset, dataset: Any, stage: str, remote: bool, taken: int
) -> tuple[KeptBlocks | StreamedBlocks, int]:
    kinds, rows, size = ray_private.plan_size(dataset)
    keep = source.keep_in_memory
    if keep is None and (kinds is None or not kinds <= _ONLY_READ):
        keep = False
    # workers that idle for the next run are there for it with what this one finds out
    known = prepared.find(source.dataset, source.columns) if remote else None
    if known is not None and known.blocks is not None and keep is not False:
        refs, counts, taken = known.blocks
        return KeptBlocks(source, list(refs), list(counts)), taken
    # begun now, its actor's process starts while files are listed
    streamed = StreamedBlocks(source, stage, remote) if keep is False else None
    if known is None:
        listed = ray_private.listed_once(ray_private.lasting_blocks(dataset))
        known = prepared.keep(source.dataset, source.columns, listed) if remote else None
    else:
        listed = known.listed
    dataset, listed_rows, listed_size = listed
    rows, size = listed_rows if listed_rows is not None else rows, listed_size if listed_size is not None else size
    if source.columns is not None:
        dataset = dataset.select_columns(list(source.columns))
    if keep is None:
        room = KEEP_SHARE * _smallest_store() - taken
        keep = size is not None and size <= room
    schema = dataset.schema(fetch_if_missing=False)
    if keep:
        dataset = dataset.materialize()
        schema = dataset.schema()
    _advise(stage, schema)
    if not keep:
        streamed = streamed or StreamedBlocks(source, stage, remote)
        streamed.take(dataset, rows)
        return streamed, 0
    blocks = _kept(source, dataset)
    taken = int(dataset.size_bytes())
    if known is not None:
        known.blocks = list(blocks.refs), list(blocks.rows), taken
    log.info("The %s dataset stays in the object store: %d rows, %.0f MB.", stage, blocks.total, taken / 1e6)
    return blocks, taken


def _advise(stage: str, schema: Any) -> None:
    hint = advice(schema) if schema is not None else None
    if hint is not None:
        log.warning("The %s dataset: %s.", stage, hint)


def _kept(source: RayDataset, dataset: Any) -> KeptBlocks:
    found = list(ray_private.internal_blocks(dataset))
    return KeptBlocks(source, [ref for ref, _ in found], [rows for _, rows in found])


def _smallest_store() -> float:
    """Bytes of the smallest node's object store."""
    import ray

    return min(float(n["Resources"].get("object_store_memory", 0)) for n in ray.nodes() if n["Alive"])


def require_free_cpu(workers: int, cpus: float = 1.0) -> None:
    """Refuse to begin where the workers take every CPU, since Ray Data's tasks would wait for one without a word.

    Raises:
        ResourceError: Says what there is, and what to do.
    """
    import ray

    have, needed = ray.cluster_resources().get("CPU", 0.0), workers * cpus + 1
    if have < needed:
        raise ResourceError(
            f"{workers} worker(s) take every CPU of this Ray, which has {have:g}, and reading a Ray Dataset needs one "
            f"more. Use fewer workers, start Ray with ray.init(num_cpus={needed:g}) (it counts what it is told), let "
            f"raytrainer start it, or give the dataset as ds.materialize()."
        )
