"""DP: a loader's batch is for the whole job, on one node, whose workers split it; the gradient is the full batch's."""

from __future__ import annotations

from typing import final

from raytrainer.data.sharding import Share
from raytrainer.strategies.node_strategy import NodeStrategy

__all__ = ["DPStrategy"]


@final
class DPStrategy(NodeStrategy):
    """All workers read every batch."""

    @property
    def share(self) -> Share:
        return Share(0, 1, readers=self.ranks.local_world_size)
