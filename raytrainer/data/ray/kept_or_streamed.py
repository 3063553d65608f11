"""Whether a Ray Dataset stays in memory or is executed in each epoch, and making it ready for that; on the driver."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raytrainer.data.ray import prepared
from raytrainer.data.ray.blocks import KeptBlocks, StreamedBlocks
from raytrainer.data.ray.columns import advice
from raytrainer.errors import ResourceError
from raytrainer.private import ray_private

if TYPE_CHECKING:
    from raytrainer.data.ray.ray_dataset import RayDataset

__all__ = ["is_materialized", "prepare", "require_free_cpu"]

log = logging.getLogger("raytrainer")

#: Share of a node's object store that datasets may take which nobody asked to keep.
KEEP_SHARE = 0.3

#: Operators that give the same rows in every epoch, so that keeping those changes nothing.
_ONLY_READ = {"Read", "ReadFiles", "ListFiles", "InputData", "Project", "Limit", "Union"}
_ONLY_READ |= {"FromItems", "FromBlocks", "FromNumpy", "FromArrow", "FromPandas"}


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
        files = prepared.files_of(source.dataset) if remote else None
        listed = ray_private.listed_once(ray_private.lasting_blocks(dataset))
        known = prepared.keep(source.dataset, source.columns, listed, files)
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
            f"raytrainer start it (make the dataset in a DataModule's train_dataset(), which is called once Ray runs), "
            f"or give the dataset as ds.materialize()."
        )
