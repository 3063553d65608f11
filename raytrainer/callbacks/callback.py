"""The two kinds of callback: `Callback` on the driver, `WorkerCallback` beside the module in every worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from raytrainer.callbacks.running_trainer import RunningTrainer
from raytrainer.errors import MetricError
from raytrainer.messages import EvaluationReport, TrainReport
from raytrainer.module import Module
from raytrainer.stateful_callback import StatefulCallback
from raytrainer.view.trainer_view import TrainerView

__all__ = ["Callback", "WorkerCallback"]


class Callback(StatefulCallback):
    """Runs on the driver, at the boundaries of epochs, validations and chunks of work.

    It sees metrics that are already reduced over all workers, and may ask the trainer to stop
    (`trainer.should_stop = True`) or to save (`trainer.save_checkpoint(path)`). `module` is the driver's object: its
    weights are brought up to date when `fit` returns. For batch-level hooks beside the module, see `WorkerCallback`.

    A hook is called after the workers' hook of the same name; `setup`, `on_fit_start`, `on_train_epoch_start`,
    `on_train_end` and `on_load_checkpoint` are called before it.
    """

    #: End a chunk of training at every multiple of this many optimizer steps, so that
    #: `on_train_chunk_end` is called exactly there. None: no wish.
    every_n_train_steps: int | None = None

    #: Whether this callback runs after all others and after their `on_train_epoch_end` (checkpointing does,
    #: so that what others changed is saved).
    runs_last: ClassVar[bool] = False

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Not here.

        Raises:
            MetricError: Always: what is logged is reduced over workers, where this is not.
        """
        raise MetricError(
            f"{type(self).__name__}.log({name!r}, ...): a Callback runs on the driver. Derive it from WorkerCallback, "
            f"whose hooks may log; or give the loggers a value of the driver's: trainer.log_metrics({{{name!r}: ...}})."
        )

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Not here; see `log`."""
        self.log(next(iter(dictionary), ""))

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Before anything else; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """After everything else, also when the run failed."""

    def on_fit_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before the sanity check; loaders' lengths are not known yet."""

    def on_fit_end(self, trainer: RunningTrainer, module: Module) -> None:
        """At the end of `fit`, when the module holds the trained weights."""

    def on_sanity_check_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before the sanity check's validation batches."""

    def on_sanity_check_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After the sanity check's validation batches."""

    def on_train_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before the first epoch; `trainer.num_training_batches` is known."""

    def on_train_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before an epoch's first batch."""

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After an epoch, its validation and the module's own hook; `trainer.callback_metrics` has its metrics."""

    def on_train_chunk_end(self, trainer: RunningTrainer, module: Module, report: TrainReport) -> None:
        """After each chunk of training batches (at most about a second of work).

        On GPUs, what its last batch logged may reach the loggers with the next chunk only, so that the GPUs need not
        wait; whoever looks at `trainer.callback_metrics` waits for it.
        """

    def on_validation_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before a validation (also the sanity check: see `trainer.sanity_checking`)."""

    def on_validation_epoch_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Right after `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After the last validation batch; metrics are in `trainer.callback_metrics`."""

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After a validation, when its metrics have been logged."""

    def on_test_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before the test batches."""

    def on_test_epoch_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Right after `on_test_start`."""

    def on_test_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After the last test batch."""

    def on_test_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After testing, when its metrics have been logged."""

    def on_predict_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Before the prediction batches."""

    def on_predict_epoch_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Right after `on_predict_start`."""

    def on_predict_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After the last prediction batch."""

    def on_predict_end(self, trainer: RunningTrainer, module: Module) -> None:
        """After prediction."""

    def on_evaluation_chunk_end(self, trainer: RunningTrainer, module: Module, report: EvaluationReport) -> None:
        """After each chunk of validation, test or prediction batches; on GPUs, rows of the last may come later."""

    def on_exception(self, trainer: RunningTrainer, module: Module, exception: BaseException) -> None:
        """When the run fails or is aborted, before `teardown`."""

    def on_save_checkpoint(self, trainer: RunningTrainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; may add plain values and tensors to it."""

    def on_load_checkpoint(self, trainer: RunningTrainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read, before its state is restored."""


class WorkerCallback(StatefulCallback):
    """Pickled to every worker, where it runs beside the module, before the module's hook of the same name.

    `trainer` is the worker's `TrainerView` (ranks, counters, metrics; `should_stop` may be set), `module` the live
    module on its device. `self.log(...)` is the module's, and works in the same hooks. Only hooks that a subclass
    overrides cost anything. `state_dict` is asked of rank 0, and given back to all workers; workers that replace lost
    ones are set up anew, with `on_fit_start` and `on_train_start`, and then go on within the epoch.
    """

    def log(self, name: str, value: Any, **options: Any) -> None:
        """`Module.log` of the module beside which this runs.

        Raises:
            MetricError: There is no run.
        """
        self._module_beside(name).log(name, value, **options)

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """`Module.log_dict` of the module beside which this runs."""
        self._module_beside(next(iter(dictionary), "")).log_dict(dictionary, **options)

    def _module_beside(self, name: str) -> Module:
        module: Module | None = self.__dict__.get("_beside", lambda: None)()
        if module is None:
            raise MetricError(f"{type(self).__name__}.log({name!r}, ...): this callback is in no run.")
        return module

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Before the module's `setup`."""

    def teardown(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Before the module's `teardown`."""

    def on_fit_start(self, trainer: TrainerView, module: Module) -> None:
        """The module is on its device and has its optimizers."""

    def on_fit_end(self, trainer: TrainerView, module: Module) -> None:
        """At the end of `fit`, before weights are sent to the driver."""

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: TrainerView, module: Module) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Before an epoch's first batch."""

    def on_train_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """After an epoch and its validation."""

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        """Before each training batch, which is on the device."""

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each training batch; `outputs` as in the module's hook: a dict with the detached "loss"."""

    def on_before_zero_grad(self, trainer: TrainerView, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Before gradients are zeroed."""

    def on_before_backward(self, trainer: TrainerView, module: Module, loss: torch.Tensor) -> None:
        """Before the backward pass."""

    def on_after_backward(self, trainer: TrainerView, module: Module) -> None:
        """After the backward pass; gradients are synchronised on stepping batches."""

    def on_before_optimizer_step(self, trainer: TrainerView, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Before the optimizer step and before clipping."""

    def on_validation_start(self, trainer: TrainerView, module: Module) -> None:
        """Before a validation; the module is in evaluation mode."""

    def on_validation_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Right after `on_validation_start`."""

    def on_validation_batch_start(
        self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each validation batch."""

    def on_validation_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After each validation batch."""

    def on_validation_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """After the last validation batch."""

    def on_validation_end(self, trainer: TrainerView, module: Module) -> None:
        """After a validation."""

    def on_test_start(self, trainer: TrainerView, module: Module) -> None:
        """Before testing; the module is in evaluation mode."""

    def on_test_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Right after `on_test_start`."""

    def on_test_batch_start(
        self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each test batch."""

    def on_test_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After each test batch."""

    def on_test_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """After the last test batch."""

    def on_test_end(self, trainer: TrainerView, module: Module) -> None:
        """After testing."""

    def on_predict_start(self, trainer: TrainerView, module: Module) -> None:
        """Before prediction; the module is in evaluation mode."""

    def on_predict_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Right after `on_predict_start`."""

    def on_predict_batch_start(
        self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each prediction batch."""

    def on_predict_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After each prediction batch."""

    def on_predict_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """After the last prediction batch."""

    def on_predict_end(self, trainer: TrainerView, module: Module) -> None:
        """After prediction."""

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        """When a hook or step raised in this worker; in the driver's process, also when anything else has failed."""

    def on_save_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Before the module's, on the workers that give the common part of a checkpoint or snapshot.

        `checkpoint` has "state_dict" and, unless it is to hold weights only, "optimizer_states", "lr_schedulers" and
        "worker_callbacks". Change entries by replacing them: their tensors are the live ones.
        """

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """When training goes on from a checkpoint or snapshot, on every worker.

        The module has its weights; the optimizers and schedulers, which may be changed here, take up their state next,
        and then `load_state_dict` is called. Copy tensors that are kept: the checkpoint may be loaded once more.
        """
