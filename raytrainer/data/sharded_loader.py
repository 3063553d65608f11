"""A user's DataLoader with samplers of this package: who shards, who shuffles, whose randomness it is."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from raytrainer.data.memories import tell_epoch
from raytrainer.data.sharding import IndexShard, ShardedBatches, Share, is_plain_batching
from raytrainer.errors import DataError
from raytrainer.plan.settings import Settings
from raytrainer.private.torch_private import forget_iterator

__all__ = ["ShardedLoader", "length_of", "shard_loader"]

log = logging.getLogger("raytrainer")


@dataclass
class ShardedLoader:
    """What a worker reads in place of a user's DataLoader.

    Attributes:
        loader: A copy of the user's loader, of the same class.
        batches: What decides on its batches; None where the dataset does.
    """

    loader: DataLoader[Any]
    batches: ShardedBatches | None


def shard_loader(
    loader: DataLoader[Any], stage: str, share: Share, seed: int, settings: Settings, epoch: int = 0
) -> ShardedLoader:
    """Put samplers into a copy of the loader, so that the user's stays as it is.

    Samplers are told the `epoch` first, on which their lengths may depend.

    Raises:
        DataError: A batch sampler without a length is to be sharded.
    """
    copied = copy.copy(loader)
    forget_iterator(copied)
    # __dict__, since DataLoader refuses to set samplers
    if settings.on_gpu and loader.num_workers > 0:
        # done by a thread of the loader's, it costs the training loop nothing
        copied.__dict__["pin_memory"] = True
    if isinstance(loader.dataset, IterableDataset):
        if share.count > 1 and not settings.fast_dev_run:
            log.info(
                "The %s loader reads an IterableDataset: each worker reads what it yields there; shard it by "
                "self.trainer.global_rank (by node_rank for ddp2).", stage,
            )  # fmt: skip
        return ShardedLoader(copied, None)
    batched = loader.batch_sampler is not None
    outer: Any = loader.batch_sampler if batched else loader.sampler
    inner: Any = getattr(outer, "sampler", loader.sampler) if batched else loader.sampler
    for sampler in (outer, inner):
        tell_epoch(sampler, epoch)
    own_sharding = isinstance(inner, DistributedSampler) or isinstance(loader.sampler, DistributedSampler)
    train = stage == "train"
    if train and settings.overfit:
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
        seeded=batched and loader.num_workers > 0,
        rank=share.index,
        alone=not settings.use_distributed_sampler,
    )
    if of_batches.count > 1 and length_of(outer) is None:
        raise DataError(
            f"the {stage} loader's batch sampler {type(outer).__name__} has no length, so it cannot be "
            f"sharded over {of_batches.count} workers; give it __len__, or use_distributed_sampler=False."
        )
    copied.__dict__["batch_sampler" if batched else "sampler"] = batches
    return ShardedLoader(copied, batches)


def length_of(thing: Any) -> int | None:
    """`len(thing)`; None if it has none."""
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None
