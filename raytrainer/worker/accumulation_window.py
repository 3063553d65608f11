"""The batches that make one step together, for optimizers that evaluate its loss several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raytrainer.errors import ConfigurationError
from raytrainer.view.trainer_view import TrainerView
from raytrainer.worker.logger_recorder import Recorder

__all__ = ["Window"]


class Window:
    """Keeps a window's batches, so that each evaluation is of all of them, at the weights of its moment.

    The gradients that earlier batches have left are those of the step's first weights: added to each evaluation they
    would point away from where the loss falls by then. So from the second evaluation on, earlier batches are gone
    through again.

    Batches are kept where an optimizer is known to evaluate several times, and in the first window in any case; where
    once was enough in that one, memory is spared from then on.

    Args:
        view: The run.
        recorder: Of `self.logger`.
        several: The optimizer is known to evaluate several times.
    """

    def __init__(self, view: TrainerView, recorder: Recorder, several: bool) -> None:
        self._view, self._recorder, self._several = view, recorder, several
        self._keeps = True
        self._batches: list[tuple[Any, int]] = []
        self._evaluations = 0
        self.losses: list[Tensor | None] = []  # of the window's batches but the last, as of the latest evaluation

    def add(self, batch: Any, index: int, loss: Tensor | None) -> None:
        """A batch that does not end the window is through."""
        self.losses.append(loss)
        if self._keeps:
            self._batches.append((batch, index))

    def evaluate(self, count: int) -> Iterator[tuple[Any, int]]:
        """An evaluation begins: the batches (and their numbers) to go through before the last one.

        Args:
            count: How many there are.

        Raises:
            ConfigurationError: They were not kept.
        """
        self._evaluations += 1
        if self._evaluations == 1 or count == 0:
            return iter(())
        if len(self._batches) < count:
            raise ConfigurationError(
                "accumulate_grad_batches with an optimizer that evaluates its closure again, where a window's earlier "
                "batches are gone: the run goes on from a checkpoint in the middle of a window (choose one made after "
                "a step), or the optimizer has called its closure once in each step so far. Then take the closure in "
                "`def step(self, closure)`, without a default, which says that it is called several times."
            )
        self._several = True
        self.losses = []
        return iter(self._batches)

    def total(self, last: Tensor | None, device: torch.device) -> Tensor:
        """The window's loss; `last` is that of its last batch. What had none counts as zero."""
        found = [loss for loss in (*self.losses, last) if loss is not None]
        return torch.stack([loss.reshape(()) for loss in found]).sum() if found else torch.zeros((), device=device)

    def end(self) -> int:
        """The step is made; how often its loss was evaluated."""
        evaluations = self._evaluations
        if self.losses and not self._several:
            self._keeps = False
        self._batches, self.losses, self._evaluations = [], [], 0
        return evaluations

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside, `self.log` and `self.logger` do nothing: the batch has been logged before."""
        store, keeps = self._view.metrics, self._recorder.keeps
        self._view.metrics, self._recorder.keeps = _Unheard(store), False  # type: ignore[assignment]
        try:
            yield
        finally:
            self._view.metrics, self._recorder.keeps = store, keeps


class _Unheard:
    """Stands for a MetricStore, and logs nothing."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
