"""Which strategy a run's settings ask for, with the groups that it needs."""

from __future__ import annotations

import torch

from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import Settings
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.strategies import DDP2Strategy, DDPStrategy, DPStrategy, SingleStrategy, Strategy
from raytrainer.strategies.replicated import ReplicatedStrategy
from raytrainer.worker.process_group import ProcessGroup

__all__ = ["make_strategy"]


def make_strategy(
    settings: Settings, ranks: Ranks, device: torch.device, group: ProcessGroup | None, seed: int = 0
) -> Strategy:
    """This worker's side of it; without a group, of one worker. All workers must call it together."""
    if group is not None and settings.sharding is not None:
        return _sharded(settings, settings.sharding, ranks, device, group, seed)
    if group is None or ranks.world_size == 1:
        return SingleStrategy(ranks, device)
    group.set_timeout(settings.ddp.timeout_seconds)
    common = ranks, device, group.control, settings.ddp
    strategy: ReplicatedStrategy
    if settings.strategy == "ddp":
        strategy = DDPStrategy(*common, store=group.store)
    else:
        kind = DDP2Strategy if settings.strategy == "ddp2" else DPStrategy
        strategy = kind(*common, *group.of_node(ranks), store=group.store)
    strategy.store, strategy.board, strategy.votes = group.store, group.board, group.votes
    return strategy


def _sharded(
    settings: Settings, sharding: FSDP, ranks: Ranks, device: torch.device, group: ProcessGroup, seed: int
) -> Strategy:
    from raytrainer.strategies.fsdp import FSDPStrategy  # a second to import, which others need not spend

    group.set_timeout(sharding.timeout_seconds)
    copies, data, tensor = sharding.layout(ranks.num_nodes, ranks.world_size)
    dimensions = {"replicate": copies, "data_parallel": data, "tensor_parallel": tensor}
    if copies == 1:
        del dimensions["replicate"]
    mesh = group.mesh(tuple(dimensions.values()), tuple(dimensions))
    strategy = FSDPStrategy(
        ranks, device, group.control, sharding, mesh, group.store,
        precision=settings.precision, compiles=settings.compile, seed=seed,
    )  # fmt: skip
    strategy.store, strategy.board, strategy.votes = group.store, group.board, group.votes
    return strategy
