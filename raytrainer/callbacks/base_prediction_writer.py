"""Write predictions in a way of one's own, from the workers that make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.data.transfer import to_cpu
from raytrainer.plan import argument_checks as checks

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["BasePredictionWriter"]

Indices = Sequence[Any] | None


class BasePredictionWriter(WorkerCallback):
    """To derive from: writes what `predict_step` returns, as Lightning's class of this name.

    Override `write_on_batch_end` or `write_on_epoch_end`, or both. Every worker calls them with its own batches: have
    file names contain `trainer.global_rank`. Of workers that split layers, and so predict the same, the first one has
    them written; the others call `write_on_epoch_end` alone, with nothing. Use it with
    `trainer.predict(..., return_predictions=False)`. For Parquet there is `PredictionWriter`.

    Args:
        write_interval: "batch", "epoch", or "batch_and_epoch": which of the two are called.

    Raises:
        ConfigurationError: Another interval.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        allowed = ("batch", "epoch", "batch_and_epoch")
        self.write_interval = checks.choice(f"{type(self).__name__}(write_interval)", write_interval, allowed)
        self._begin(0)

    def _begin(self, loaders: int) -> None:
        self._predictions: list[list[Any]] = [[] for _ in range(loaders)]
        self._indices: list[list[Indices]] = [[] for _ in range(loaders)]

    def write_on_batch_end(
        self,
        trainer: TrainerView,
        module: Module,
        prediction: Any,
        batch_indices: Indices,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch's prediction.

        Args:
            trainer: The worker's view of the run.
            module: The module.
            prediction: What `predict_step` has returned.
            batch_indices: Of the batch's samples in the dataset; None where no sampler chooses them.
            batch: The batch.
            batch_idx: Its index among those of this worker and loader.
            dataloader_idx: The loader's index.
        """
        raise NotImplementedError

    def write_on_epoch_end(
        self, trainer: TrainerView, module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all of this worker's predictions.

        Args:
            trainer: The worker's view of the run.
            module: The module.
            predictions: By batch, on the CPU; of several loaders, by loader and batch.
            batch_indices: By loader and batch; see `write_on_batch_end`.
        """
        raise NotImplementedError

    def on_predict_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Begin anew."""
        self._begin(len(trainer.length_source("predict")))

    def on_predict_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have the batch written, or keep its prediction."""
        if not trainer.strategy.counts:
            return
        indices = trainer.batch_indices
        if self.write_interval != "epoch":
            self.write_on_batch_end(trainer, module, outputs, indices, batch, batch_idx, dataloader_idx)
        if self.write_interval != "batch":
            self._predictions[dataloader_idx].append(to_cpu(outputs))
            self._indices[dataloader_idx].append(indices)

    def on_predict_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """Have all of them written."""
        predictions, indices = self._predictions, self._indices
        self._begin(0)
        if self.write_interval != "batch":
            several = predictions if len(predictions) != 1 else predictions[0]
            self.write_on_epoch_end(trainer, module, several, indices)
