"""DDP2: a loader's batch is for one node, whose workers split it; losses see the node's whole batch."""

from __future__ import annotations

from typing import final

from raytrainer.data.sharding import Share
from raytrainer.strategies.node_strategy import NodeStrategy

__all__ = ["DDP2Strategy"]


@final
class DDP2Strategy(NodeStrategy):
    """Each node reads its own share of every loader; gradients are averaged over nodes."""

    @property
    def share(self) -> Share:
        return Share(self.ranks.node_rank, self.ranks.num_nodes, readers=self.ranks.local_world_size)
