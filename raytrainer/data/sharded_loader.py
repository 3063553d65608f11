"""A user's DataLoader with samplers of this package: who shards, who shuffles, whose randomness it is."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from raytrainer.data.by_value import start_by_value
from raytrainer.data.known_samplers import is_plain_batching, is_torchs
from raytrainer.data.memories import has_state, tell_epoch
from raytrainer.data.own_generators import holds_objects
from raytrainer.data.own_readers import (
    StandIn,
    finite_loader,
    front_of,
    inner_loader,
    kept_readers,
    loaders_in,
    part_at,
    reads_plainly,
    with_part,
)
from raytrainer.data.own_sharding import at_its_place, own_part
from raytrainer.data.seeded_indices import SeededCollate
from raytrainer.data.sharding import IndexShard, ShardedBatches, Share
from raytrainer.data.web_pipelines import warn_of_the_clock
from raytrainer.errors import DataError
from raytrainer.plan.settings import Settings
from raytrainer.private.torch_private import forget_iterator

__all__ = ["ShardedLoader", "length_of", "shard_loader"]

log = logging.getLogger("raytrainer")


@dataclass
class ShardedLoader:
    """What a worker reads in place of a user's loader.

    Attributes:
        loader: What to iterate: a copy of the user's loader, of the same class.
        reader: The DataLoader that reads for it, mostly the same object; None: an iterable without one.
        batches: What decides on the reader's batches; None where its dataset does.
        stand_in: Is to read from `reader`, where `loader` keeps a reader of its own.
        in_step: Whether each of the reader's batches becomes one batch.
    """

    loader: Any
    reader: DataLoader[Any] | None = None
    batches: ShardedBatches | None = None
    stand_in: StandIn | None = None
    in_step: bool = True

    @property
    def splits(self) -> bool:
        """Whether workers get different parts by `batches`."""
        batches = self.batches
        if batches is None:
            return False
        return batches.share.count > 1 or (batches.shard is not None and batches.shard.share.count > 1)

    @property
    def steady(self) -> bool:
        """Whether nothing of the user's is asked which batches an epoch has, or told of it: all is torch's own."""
        batches, reader = self.batches, self.reader
        if batches is None or reader is None or type(self.loader) is not DataLoader or self.loader is not reader:
            return False
        own = batches.shard is not None and (batches.source is batches.shard or is_plain_batching(batches.source))
        return own and is_torchs(batches.users) and not hasattr(reader.dataset, "set_epoch")

    def batch_size(self, given: Any) -> int | None:
        """Samples in a batch of the `given` loader, the user's; None where that is not known, or up to a sampler."""
        batching = None if self.batches is None else self.batches.source
        size = getattr(batching if is_plain_batching(batching) else given, "batch_size", None)
        return size if isinstance(size, int) else None


def shard_loader(loader: Any, stage: str, share: Share, seed: int, settings: Settings, epoch: int = 0) -> ShardedLoader:
    """Put samplers into a copy of the loader, or of the one that it wraps, so that the user's stays as it is.

    Samplers are told the `epoch` first, on which their lengths may depend.

    Raises:
        DataError: It cannot be sharded.
    """
    arguments = stage, share, seed, settings, epoch
    if stage == "train" and share.index == 0:
        warn_of_the_clock(loader, stage)
    if kept := kept_readers(loader):
        return _with_kept_reader(loader, kept[0], *arguments)
    if isinstance(loader, DataLoader):
        return _sharded(loader, *arguments)
    way = inner_loader(loader)
    if way is None:
        if stage == "train" and share.count > 1 and settings.use_distributed_sampler:
            _refuse_whole(loader, share)
        return ShardedLoader(loader)
    inner = part_at(loader, way)
    sharded = shard_loader(inner, *arguments)
    if sharded.reader is None or sharded.batches is None:
        return ShardedLoader(with_part(loader, way, sharded.loader), sharded.reader, in_step=False)
    alike = length_of(loader) is not None and length_of(loader) == length_of(inner)
    if sharded.splits and not alike:
        raise DataError(
            f"the {stage} loader {type(loader).__name__} reads a DataLoader (its .{'.'.join(way)}), but does not say "
            f"that it gives one batch for each of the loader's, so that it cannot be sharded over {share.count} "
            f"workers: give it a __len__ that returns the loader's; or shard it yourself, with a DistributedSampler "
            f"in that loader or with use_distributed_sampler=False."
        )
    front = with_part(loader, way, sharded.loader)
    in_step = sharded.in_step and alike and not has_state(loader)
    return ShardedLoader(front, sharded.reader, sharded.batches, sharded.stand_in, in_step)


def _refuse_whole(loader: Any, share: Share) -> None:
    """Raise a DataError if an iterable holds loaders each of which would be read whole by every worker."""
    if isinstance(loader, (DataLoader, list, tuple, dict)):
        return
    whole = [
        inner
        for inner in loaders_in(loader)
        if not isinstance(inner.dataset, IterableDataset) and own_part(inner.batch_sampler or inner.sampler) is None
    ]
    if whole:
        raise DataError(
            f"the train loader {type(loader).__name__} holds {len(whole)} DataLoader(s), and how it reads them is not "
            f"known here: each of {share.count} workers would read all of their samples. Give the loaders themselves "
            f"(a dict or list of them, or a CombinedLoader with a mode), or each of them a DistributedSampler with "
            f"rt.world_size() and rt.rank(); or say use_distributed_sampler=False where it shards them in a way of "
            f"its own."
        )


def _with_kept_reader(
    loader: Any, name: str, stage: str, share: Share, seed: int, settings: Settings, epoch: int
) -> ShardedLoader:
    found = (
        f"the {stage} loader {type(loader).__name__} keeps a reader of its own (its .{name}), and what that reads "
        f"cannot be told"
    )
    plain = finite_loader(loader) if isinstance(loader, DataLoader) else None
    if plain is not None:
        sharded = _sharded(plain, stage, share, seed, settings, epoch)
        if sharded.batches is not None:
            stand_in = StandIn()
            front = front_of(loader, sharded.batches, stand_in)
            return ShardedLoader(front, sharded.reader, sharded.batches, stand_in)
    instead = "use torch's DataLoader with persistent_workers=True, which keeps its processes too"
    if share.count > 1 and settings.use_distributed_sampler:
        raise DataError(f"{found}, so that it cannot be sharded over {share.count} workers: {instead}.")
    log.warning("%s: it is read as it is, and a resumed run may read other samples; %s.", found, instead)
    return ShardedLoader(loader)


def _sharded(
    loader: DataLoader[Any], stage: str, share: Share, seed: int, settings: Settings, epoch: int
) -> ShardedLoader:
    copied = copy.copy(loader)
    forget_iterator(copied)
    start_by_value(copied)
    # __dict__, since DataLoader refuses to set samplers
    if settings.on_gpu and loader.num_workers > 0:
        # done by a thread of the loader's, it costs the training loop nothing
        copied.__dict__["pin_memory"] = True
    if not getattr(loader, "in_order", True):
        # in the order in which processes are ready, which nothing can repeat, and which no batch's number tells
        copied.__dict__["in_order"] = True
    if isinstance(loader.dataset, IterableDataset):
        return ShardedLoader(copied, copied)
    batched = loader.batch_sampler is not None
    outer: Any = loader.batch_sampler if batched else loader.sampler
    inner: Any = getattr(outer, "sampler", loader.sampler) if batched else loader.sampler
    for sampler in (outer, inner):
        tell_epoch(sampler, epoch)
    in_step = reads_plainly(loader) or length_of(loader) == length_of(outer)
    train = stage == "train"
    overfit = stage in ("train", "val") and settings.overfit
    own_sharding = not overfit and own_part(outer) is not None
    if own_sharding and settings.use_distributed_sampler:
        outer = at_its_place(outer, share, stage)
    if overfit:
        inner = torch.utils.data.SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    of_batches = Share(0, 1)
    if settings.use_distributed_sampler and not own_sharding:
        of_batches = share
        if (not batched or is_plain_batching(outer)) and length_of(inner) is not None:
            # training shards samples; evaluation whole batches, so that each is what one process would see
            shard = IndexShard(inner, share if train else Share(0, 1), seed)
            outer = BatchSampler(shard, outer.batch_size, outer.drop_last) if batched else shard
            of_batches = Share(0, 1) if train else share
    batches = ShardedBatches(
        outer,
        of_batches,
        seed,
        pad=train,
        seeded=loader.num_workers > 0,
        rank=share.index,
        alone=not settings.use_distributed_sampler,
    )
    if of_batches.count > 1 and length_of(outer) is None:
        raise DataError(
            f"the {stage} loader's batch sampler {type(outer).__name__} has no length, so it cannot be "
            f"sharded over {of_batches.count} workers; give it __len__, or use_distributed_sampler=False."
        )
    batches.sealed = reads_plainly(loader)
    if stage == "predict" and of_batches.count > 1 and not in_step:
        raise DataError(
            f"the predict loader {type(loader).__name__} makes other batches than it reads, so that predictions of "
            f"{of_batches.count} workers could not be put in order: predict with one worker, or give a loader whose "
            f"__len__ is that of its batch sampler."
        )
    copied.__dict__["batch_sampler" if batched else "sampler"] = batches
    if loader.num_workers and holds_objects(loader.collate_fn):
        copied.collate_fn = SeededCollate(loader.collate_fn)
    return ShardedLoader(copied, copied, batches, in_step=in_step)


def length_of(thing: Any) -> int | None:
    """`len(thing)`; None if it has none."""
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None
