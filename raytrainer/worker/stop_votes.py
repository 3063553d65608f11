"""`StopVotes`: workers that are asked to stop by their module or callbacks all do so after the same batch."""

from __future__ import annotations

from collections.abc import Callable

from raytrainer.strategies.group_strategy import GroupStrategy
from raytrainer.strategies.strategy import Strategy
from raytrainer.view.trainer_view import TrainerView

__all__ = ["StopVotes"]


class StopVotes:
    """The votes of one chunk of training.

    One worker stops after the batch in which it is asked to. Several vote, since each may be asked alone: a vote begins
    every so many batches and is read when the next one begins, so that nobody waits for it. Requests that the driver
    knows of already, but has not honoured yet, do not count.

    Args:
        strategy: By which they vote.
        view: Has the request.
        every: Batches from vote to vote, the same on all workers.

    Attributes:
        every: How often to call `take`, in batches.
    """

    def __init__(self, strategy: Strategy, view: TrainerView, every: int) -> None:
        several = isinstance(strategy, GroupStrategy) and strategy.ranks.world_size > 1
        self._begin = strategy.begin_any if isinstance(strategy, GroupStrategy) and several else None
        self.every = every if several else 1
        self._view, self._known = view, view.should_stop
        self._under_way: Callable[[], bool] | None = None

    def take(self) -> bool:
        """Begin a vote; return whether the one before says that training stops here."""
        asked = self._view.should_stop and not self._known
        if self._begin is None:
            return asked
        before, self._under_way = self._under_way, self._begin(asked)
        return before is not None and before()

    def close(self) -> None:
        """No vote is left under way when the chunk ends: what follows has collectives of its own."""
        if self._under_way is not None:
            self._under_way()
