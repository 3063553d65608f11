"""DistributedDataParallel: every worker has its own batch; gradients are averaged over all."""

from __future__ import annotations

from typing import final

from raytrainer.data.sharding import Share
from raytrainer.strategies.replicated import ReplicatedStrategy

__all__ = ["DDPStrategy"]


@final
class DDPStrategy(ReplicatedStrategy):
    """Each worker reads its own share of every loader."""

    @property
    def share(self) -> Share:
        return Share(self.ranks.rank, self.ranks.world_size)
