"""`ModuleHooks`: everything that a run calls on a module, with what it does by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from raytrainer.module_in_run import AttachedModule
from raytrainer.stateful_callback import StatefulCallback

__all__ = ["ModuleHooks"]


class ModuleHooks(AttachedModule):
    """What a `Module` may override. `DataHooks` has those about data."""

    # ---------------------------------------------------------------- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch. Write it as `training_step(self, batch, batch_idx)`, or without `batch_idx`.

        Gradients, optimizer steps and train mode are the trainer's (steps are yours if `automatic_optimization` is
        False). `self.log` logs each step's value by default.

        Args:
            batch: What the training loader gave, on `self.device`; of several workers, this worker's part of the data.
            batch_idx: Its place in the epoch, from 0, on this worker.

        Returns:
            The loss, a tensor with one element and a graph; or a dict with it as "loss", of which hooks after the batch
            see all; or None to skip the batch. In manual optimization what hooks are to see, or nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a training_step(self, batch, batch_idx) to be fitted.")

    def training_step_end(self, step_output: Any) -> Any:
        """After `training_step`, with what the strategy gathered; returns what `training_step` may return."""
        return step_output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, in eval mode and without gradients. Write it as `validation_step(self, batch, batch_idx)`.

        `self.log` logs the mean over all batches and workers by default.

        Args:
            batch: What the loader gave, on `self.device`; of several workers, this worker's part of the data.
            batch_idx: Its place in the loader, from 0, on this worker. May be left out.
            dataloader_idx: Which loader it is from, where there are several; then it must be taken.

        Returns:
            What `on_validation_batch_end` is to see, or nothing.
        """
        raise NotImplementedError

    def validation_step_end(self, step_output: Any) -> Any:
        """After `validation_step`, with what the strategy gathered."""
        return step_output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch of the test loaders. Arguments and what it returns are as of `validation_step`."""
        raise NotImplementedError

    def test_step_end(self, step_output: Any) -> Any:
        """After `test_step`, with what the strategy gathered."""
        return step_output

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict for a batch, in eval mode and without gradients; by default `self(batch)`.

        Arguments are as of `validation_step`.

        Returns:
            What `Trainer.predict` is to return for this batch: tensors, or nested dicts, lists and tuples of them.
        """
        batch = args[0] if args else kwargs["batch"]
        try:
            return self(batch)
        except Exception as error:
            if isinstance(batch, (list, tuple, dict)):
                error.add_note(
                    f"{type(self).__name__} has no predict_step, so each batch is predicted by self(batch), and here a "
                    f"batch is a {type(batch).__name__} of {len(batch)}. Write predict_step(self, batch, batch_idx)."
                )
            raise

    # ---------------------------------------------------------------- configuration

    def configure_optimizers(self) -> Any:
        """Return an optimizer; a list of them; (optimizers, schedulers); a dict or several, with "optimizer" and
        "lr_scheduler" (a scheduler, or a dict with `scheduler`, `interval` ("epoch" | "step"), `frequency`, `monitor`,
        `strict`, `name`); or None to train without.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a configure_optimizers(self) to be fitted.")

    def configure_model(self) -> None:
        """Create layers lazily, in the worker. Must do nothing when called again."""

    def configure_callbacks(self) -> Sequence[StatefulCallback] | StatefulCallback:
        """Each `Callback` and `WorkerCallback` that this module wants; the trainer's of the same type is replaced."""
        return []

    # ---------------------------------------------------------------- optimisation

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make one step. The closure runs `training_step`, zeroes gradients, runs backward and clips."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Zero the gradients."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; `metric` is the monitored value, for those that have one."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; `loss` is scaled already where precision asks for it."""
        loss.backward(*args, **kwargs)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plain values and tensors of your own to a checkpoint. Runs on rank 0."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, before the weights are loaded."""

    # ---------------------------------------------------------------- hooks of a run, in order of their first call

    def on_fit_start(self) -> None:
        """The module is on its device and has its optimizers; before the sanity check."""

    def on_train_start(self) -> None:
        """Before the first epoch, after the sanity check."""

    def on_train_epoch_start(self) -> None:
        """Before an epoch's first batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before each training batch. Return -1 (on all ranks) to skip the rest of the epoch."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """After `training_step`, before gradients are zeroed."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before the backward pass; `loss` is divided by `accumulate_grad_batches`."""

    def on_after_backward(self) -> None:
        """After the backward pass, gradients being synchronised (and not yet unscaled)."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Before the optimizer's step; gradients are unscaled and not yet clipped."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each training batch.

        `outputs` is what `training_step` returned, as a dict, empty where that was None. Its "loss" is detached, and
        divided by `accumulate_grad_batches`, as it went into the backward pass.
        """

    def on_validation_model_zero_grad(self) -> None:
        """Before a validation in `fit`: free the gradients (not while accumulating)."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        """Put the module into evaluation mode."""
        self.eval()

    def on_validation_start(self) -> None:
        """Before a validation."""

    def on_validation_epoch_start(self) -> None:
        """Right after `on_validation_start`."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each validation batch."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After each validation batch, with what the step returned."""

    def on_validation_epoch_end(self) -> None:
        """After the last validation batch."""

    def on_validation_end(self) -> None:
        """After a validation."""

    def on_validation_model_train(self) -> None:
        """Put the modules back into the modes they were in. Overriding it replaces that."""
        self.trainer.restore_modes()

    def on_train_epoch_end(self) -> None:
        """After an epoch and its validation."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_fit_end(self) -> None:
        """At the very end of `fit`."""

    def on_test_model_eval(self) -> None:
        """Put the module into evaluation mode."""
        self.eval()

    def on_test_start(self) -> None:
        """Before testing."""

    def on_test_epoch_start(self) -> None:
        """Right after `on_test_start`."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each test batch."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After each test batch."""

    def on_test_epoch_end(self) -> None:
        """After the last test batch."""

    def on_test_end(self) -> None:
        """After testing."""

    def on_test_model_train(self) -> None:
        """Put the modules back into the modes they were in. Overriding it replaces that."""
        self.trainer.restore_modes()

    def on_predict_model_eval(self) -> None:
        """Put the module into evaluation mode."""
        self.eval()

    def on_predict_start(self) -> None:
        """Before prediction."""

    def on_predict_epoch_start(self) -> None:
        """Right after `on_predict_start`."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each prediction batch."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After each prediction batch, with what the step returned."""

    def on_predict_epoch_end(self) -> None:
        """After the last prediction batch."""

    def on_predict_end(self) -> None:
        """After prediction."""
