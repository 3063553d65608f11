"""Samplers and datasets that give each worker its part themselves, in ways of their own: they are left alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch.utils.data import BatchSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

from raytrainer.data.sharding import Share
from raytrainer.errors import ConfigurationError

__all__ = ["at_its_place", "own_part", "remedy"]

log = logging.getLogger("raytrainer")

#: What to write where a library's stream is not sharded, by the package that its class is from.
_IN_WORKERS = "make the StreamingDataset in train_dataloader(), which runs in the workers"
_REMEDIES = {
    "datasets": "split_dataset_by_node(dataset, rank=rt.rank(), world_size=rt.world_size()) of datasets.distributed, "
    "called in train_dataloader(), which runs in the workers",
    "litdata": _IN_WORKERS,
    "streaming": _IN_WORKERS,
    "webdataset": "WebDataset(..., nodesplitter=wds.split_by_node)",
}


def own_part(sampler: Any) -> tuple[int, int] | None:
    """(rank, num_replicas) of a sampler or batch sampler that reads one part, as torch's `DistributedSampler`.

    None for one that says nothing of the kind.
    """
    for _ in range(4):
        rank, count = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        if isinstance(rank, int) and isinstance(count, int):
            return rank, count
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner
    return None


def at_its_place(sampler: Any, share: Share, stage: str) -> Any:
    """A sampler with a part of its own, as it is if that is this worker's; else torch's, with the part put right.

    One that was made on the driver, or for another number of workers, cannot know.

    Raises:
        ConfigurationError: Another kind of sampler has another part.
    """
    found, wanted = own_part(sampler), (share.index, share.count)
    if found is None or found == wanted:
        return sampler
    rank, count = found
    if type(sampler) is BatchSampler and isinstance(sampler.sampler, DistributedSampler):
        moved: Any = BatchSampler(_moved(sampler.sampler, share), sampler.batch_size, sampler.drop_last)
    elif isinstance(sampler, DistributedSampler):
        moved = _moved(sampler, share)
    else:
        raise ConfigurationError(
            f"the {stage} loader's {type(sampler).__name__} reads part {rank} of {count}, but this worker's part is "
            f"{share.index} of {share.count}: make it in {stage}_dataloader(), which runs in the workers, with "
            f"num_replicas and rank from rt.world_size() and rt.rank()."
        )
    if share.index == (found == (0, share.count)):  # the first whose part is another
        log.info(
            "The %s loader's DistributedSampler was made for part %d of %d, where the worker's place was not known: "
            "each of the %d takes its own part.", stage, rank, count, share.count,
        )  # fmt: skip
    return moved


def _moved(sampler: DistributedSampler[Any], share: Share) -> Sampler[Any]:
    moved = copy.copy(sampler)
    rest: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, share.count, share.index, sampler.shuffle, sampler.seed, sampler.drop_last
    )
    moved.rank, moved.num_replicas = share.index, share.count
    moved.num_samples, moved.total_size = rest.num_samples, rest.total_size
    return moved


def remedy(source: Any) -> str:
    """What to write so that workers read different parts."""
    dataset = getattr(source, "dataset", source)
    for kind in type(dataset).__mro__:  # a user's own class may derive from a library's
        package = kind.__module__.partition(".")[0]
        if package in _REMEDIES:
            return _REMEDIES[package]
    return (
        "where it is iterated, take itertools.islice(items, part, None, parts) with part, parts = rt.data_part(); or "
        "give a DataLoader of a dataset with a length"
    )
