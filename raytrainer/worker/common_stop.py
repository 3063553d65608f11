"""How a chunk of training ends early where module or callbacks ask to stop: for all workers after the same batch."""

from __future__ import annotations

from collections.abc import Callable

from raytrainer.strategies.group_strategy import GroupStrategy
from raytrainer.strategies.skipping import skip_together
from raytrainer.strategies.stop_board import StopBoard
from raytrainer.strategies.strategy import Strategy
from raytrainer.view.trainer_view import TrainerView
from raytrainer.worker.batch_sign import NONE, show_batch

__all__ = ["CommonStop", "common_stop"]


def common_stop(
    strategy: Strategy, view: TrainerView, announced: bool, chunk: int, vote_every: int, batch: int
) -> CommonStop:
    """That of one chunk.

    Args:
        strategy: Of this worker; all workers make it together.
        view: Has the request.
        announced: Whether the last batch must be known before it is read.
        chunk: Its number, higher than that of any before it.
        vote_every: Batches from vote to vote where workers vote, the same on all of them.
        batch: The first one's index in the epoch.
    """
    if not isinstance(strategy, GroupStrategy) or strategy.ranks.world_size == 1:
        return CommonStop(view, announced)
    if strategy.board is not None:
        return _OnBoard(view, strategy, chunk, batch, strategy.board)
    return _ByVotes(view, announced, strategy, chunk, batch, vote_every)


class CommonStop:
    """A worker without others stops after the batch in which it is asked to.

    Requests that the driver knows of already, but has not honoured yet, do not count.

    Args:
        view: Has the request.
        announced: Whether the last batch must be known before it is read: then it is the one after that.
    """

    def __init__(self, view: TrainerView, announced: bool) -> None:
        self._view, self._announced = view, announced
        self._stopping = False

    def before(self) -> bool:
        """To be called before each batch is read: whether it may be the last, as far as is known."""
        return self._stopping

    def after(self) -> bool:
        """To be called after each batch: whether it was the last."""
        return self._after(self._view.asks_to_stop)

    def _after(self, found: bool) -> bool:
        known, self._stopping = self._stopping, self._stopping or found
        return self._stopping and (known or not self._announced)

    def go_on(self) -> None:
        """`on_train_batch_start` has let the batch pass: its step begins."""

    def skipped(self, batch: int) -> None:
        """The rest of the epoch is skipped here from this batch on.

        Raises:
            DisagreementError: Other workers do not skip it.
        """

    def close(self) -> None:
        """The chunk has ended."""


class _OfSeveral(CommonStop):
    """A worker among others."""

    def __init__(self, view: TrainerView, announced: bool, strategy: GroupStrategy, chunk: int, batch: int) -> None:
        super().__init__(view, announced)
        self._strategy, self._chunk, self._next = strategy, chunk, batch
        self._gone_on: Callable[[], list[int]] | None = None  # ranks that are in the step of this one's batch

    def before(self) -> bool:
        show_batch(self._next)
        self._next += 1
        return super().before()

    def close(self) -> None:
        show_batch(NONE)

    def skipped(self, batch: int) -> None:
        ranks = self._strategy.ranks
        skip_together(self._strategy.store, ranks.rank, ranks.world_size, self._chunk, batch, self._gone_on)


class _ByVotes(_OfSeveral):
    """Workers of several hosts vote, since each may be asked alone.

    A vote begins every so many batches and is read when the next one begins, so that nobody waits for it.
    """

    def __init__(
        self, view: TrainerView, announced: bool, strategy: GroupStrategy, chunk: int, batch: int, every: int
    ) -> None:
        super().__init__(view, announced, strategy, chunk, batch)
        self._every, self._left = every, every
        self._under_way: Callable[[], bool] | None = None

    def after(self) -> bool:
        self._left -= 1
        if self._left:
            return False
        self._left = self._every
        if self._stopping:
            return True
        before, self._under_way = self._under_way, self._strategy.begin_any(self._view.asks_to_stop)
        return self._after(before is not None and before())

    def close(self) -> None:
        """No vote is left under way: what follows has collectives of its own."""
        super().close()
        if self._under_way is not None:
            self._under_way()


class _OnBoard(_OfSeveral):
    """Workers of one host stop after the first batch that none of them has begun when one is asked to."""

    def __init__(self, view: TrainerView, strategy: GroupStrategy, chunk: int, batch: int, board: StopBoard) -> None:
        super().__init__(view, True, strategy, chunk, batch)
        self._board, self._batch = board, -1
        self._gone_on = board.gone_on
        self._last: int | None = None
        self._told = False
        board.begin(chunk)

    def before(self) -> bool:
        super().before()
        self._batch += 1
        self._last = self._board.enter(self._batch)
        return self._last == self._batch

    def go_on(self) -> None:
        self._board.go_on()

    def after(self) -> bool:
        if self._view.asks_to_stop and not self._told:
            self._told = True
            self._board.ask()
        return self._last == self._batch
