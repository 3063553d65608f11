"""Workers that meet to agree on something, and notice when they have come for different things.

Collectives pair by their order: the n-th call of one rank with the n-th of every other, whatever each is about. Where
user code decides how many there are (`manual_backward`), a rank that leaves one out would have its next batch averaged
with this batch of the others, without a word. So each says what it has come for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from raytrainer.errors import DisagreementError

__all__ = ["BACKWARD", "END", "NEXT", "Meeting"]

#: What a worker may come for: another batch of a loader of unknown length, an averaging, a chunk's end.
NEXT, BACKWARD, END = 1, 2, 3


class Meeting:
    """One per strategy.

    Args:
        group: Over gloo, of all workers.
        world_size: Its size.

    Attributes:
        batch: The batch that this worker is at.
        calls: `manual_backward`s that it has done in this batch.
    """

    def __init__(self, group: Any, world_size: int) -> None:
        self.group, self.world_size = group, world_size
        self.batch, self.calls = 0, 0

    def meet(self, purpose: int, value: int = 0) -> tuple[int, int]:
        """Wait for all workers; the least and the greatest of their values.

        Raises:
            DisagreementError: They have come for different things. On all workers.
        """
        own = (purpose, self.batch if purpose == BACKWARD else 0, self.calls if purpose == BACKWARD else 0)
        # always of this size, so that any two meetings can pair
        numbers = torch.tensor([*own, value], dtype=torch.int64)
        both = torch.cat([numbers, -numbers])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        most, least = both[:4].tolist(), (-both[4:]).tolist()
        if most[:3] != least[:3]:
            self._refuse(purpose)
        return least[3], most[3]

    def _refuse(self, purpose: int) -> None:
        found = torch.zeros(self.world_size, 3, dtype=torch.int64)
        own = torch.tensor([purpose, self.batch, self.calls])
        dist.all_gather(list(found.unbind()), own, group=self.group)
        places = [(int(p), int(batch), int(calls)) for p, batch, calls in found.tolist()]
        # a rank that is further than another has left something out
        behind = min((batch, calls) for p, batch, calls in places if p == BACKWARD)
        early = [rank for rank, (p, batch, calls) in enumerate(places) if p != BACKWARD or (batch, calls) > behind]
        raise DisagreementError(
            f"manual_backward was left out by rank(s) {early}: {_tell(places)}. Gradients are averaged in each call: "
            f"all workers must call self.manual_backward equally often in every batch. Where a worker has nothing to "
            f"learn from, call it with a loss of zero, such as 0.0 * self(x).sum()."
        )


def _tell(places: list[tuple[int, int, int]]) -> str:
    doing = {
        NEXT: "asks for another batch after batch {batch}",
        BACKWARD: "is at call {call} in batch {batch}",
        END: "is through with batch {batch}",
    }
    return "; ".join(
        f"rank {rank} {doing[purpose].format(batch=batch, call=calls + 1)}"
        for rank, (purpose, batch, calls) in enumerate(places)
    )
