"""`Module`: the user's science. A torch.nn.Module with steps and hooks; no loops and no device calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrainer.data.hooks import DataHooks
from raytrainer.errors import ConfigurationError
from raytrainer.hparams import HyperparametersMixin, construct

if TYPE_CHECKING:
    from raytrainer.callbacks.callback import Callback, WorkerCallback
    from raytrainer.checkpoint import CheckpointPath
    from raytrainer.loggers.logger import Logger
    from raytrainer.worker.view import TrainerView

__all__ = ["Module"]

log = logging.getLogger("raytrainer")


class Module(HyperparametersMixin, DataHooks, nn.Module):
    """Write `training_step` and `configure_optimizers`; override any hook you need.

    While it trains, `self.trainer` is a view of the run, `self.device` the device that parameters, buffers and batches
    are on. After `fit` the driver's object holds the trained weights and buffers.
    """

    #: Set to False in `__init__` to call optimizers yourself, with `self.optimizers()` and `self.manual_backward`.
    automatic_optimization: bool

    #: Whether `load_from_checkpoint` and resuming demand that the keys of the state dicts match exactly.
    strict_loading: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True
        self.strict_loading = True
        self.__dict__["_view"] = None
        self.__dict__["_device"] = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        # the view and compiled code belong to one process
        return {k: v for k, v in self.__dict__.items() if k != "_compiled_call_impl"} | {"_view": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        result: Self = super()._apply(fn, recurse)
        # where an empty tensor ends up is where everything else went
        self.__dict__["_device"] = fn(torch.empty(0, device=self.device)).device
        return result

    # ---------------------------------------------------------------- where am I

    @property
    def trainer(self) -> TrainerView:
        """The run as the module may see it: ranks, counters, limits, metrics.

        Raises:
            RuntimeError: The module is not attached to a run.
        """
        view = self.__dict__.get("_view")
        if view is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a Trainer; it is during fit, test, ...")
        return view  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """The device of this module's parameters and batches."""
        return self.__dict__.get("_device") or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter; torch's default if there is none."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    @property
    def global_rank(self) -> int:
        """This worker's rank over all nodes; 0 outside a run."""
        view = self.__dict__.get("_view")
        return 0 if view is None else view.global_rank

    @property
    def local_rank(self) -> int:
        """This worker's rank on its node; 0 outside a run."""
        view = self.__dict__.get("_view")
        return 0 if view is None else view.local_rank

    @property
    def global_step(self) -> int:
        """Optimizer steps done in this run; 0 outside a run."""
        view = self.__dict__.get("_view")
        return 0 if view is None else view.global_step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch in progress; 0 outside a run."""
        view = self.__dict__.get("_view")
        return 0 if view is None else view.current_epoch

    @property
    def logger(self) -> Logger | None:
        """Stands for all loggers of the run: `self.logger.log_image(...)`, `log_figure`, `log_histogram`, and so on.

        Calls of rank 0 are made on the driver's loggers, in order, with the next report (about once a second); other
        ranks' do nothing. None outside a run, and where the Trainer has no logger.
        """
        view = self.__dict__.get("_view")
        return None if view is None else view.logger

    @property
    def loggers(self) -> list[Logger]:
        """`logger` in a list; empty without one."""
        return [] if self.logger is None else [self.logger]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print`, by rank 0 only."""
        if self.global_rank == 0:
            print(*args, **kwargs)

    # ---------------------------------------------------------------- logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Tensor], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a scalar.

        Values stay on the device; they are fetched together about once a second.

        Args:
            name: The metric's name.
            value: A tensor with one element, a number, or a `torchmetrics.Metric` that is an attribute of the module.
                Of that, what its latest call returned is the step's value; the epoch's is computed from the states of
                all workers, after which it is reset.
            prog_bar: Show it in the progress bar.
            logger: Give it to the loggers (default True).
            on_step: Log each step's value. Default: True in training hooks of a batch, else False.
            on_epoch: Log the epoch's value, reduced over batches and over all workers. Default: the opposite of
                `on_step`'s. With both, the names become `name_step` and `name_epoch`.
            reduce_fx: "mean" (weighted by batch size), "sum", "min", "max", or a function of a 1-d tensor of values.
                Not used for metric objects.
            enable_graph: Accepted for compatibility; values are always detached.
            sync_dist: Average *step* values over workers; epoch values always are reduced over workers.
            sync_dist_group: Not supported: must be None.
            add_dataloader_idx: With several evaluation loaders, add "/dataloader_idx_i" to the name.
            batch_size: Samples in the batch, the weight of the mean; default: the first dimension of the batch's first
                tensor.
            metric_attribute: Accepted for compatibility.
            rank_zero_only: Only rank 0's value counts, also for epoch values.

        Raises:
            MetricError: The value is no scalar, the hook allows no logging, or options differ from an earlier call.
        """
        view = self.__dict__.get("_view")
        if view is None:
            log.warning("self.log(%r, ...) outside of a run has no effect.", name)
            return
        view.metrics.log(
            name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, sync_dist_group,
            add_dataloader_idx, batch_size, rank_zero_only,
        )  # fmt: skip

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """`log` each item, with the same options; also those of a `torchmetrics.MetricCollection`."""
        items: Any = dictionary.items
        # a collection copies the states that its members share, unless told not to
        for name, value in items(copy_state=False) if hasattr(dictionary, "compute_groups") else items():
            self.log(name, value, **options)

    # ---------------------------------------------------------------- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of `batch`: a tensor, a dict with "loss", or None to skip the batch.

        Signature: `(batch)` or `(batch, batch_idx)`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a training_step(self, batch, batch_idx) to be fitted.")

    def training_step_end(self, step_output: Any) -> Any:
        """After `training_step`, with what the strategy gathered; returns what `training_step` may return."""
        return step_output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate `batch`. Signature: `(batch)`, `(batch, batch_idx)` or `(batch, batch_idx, dataloader_idx)`."""
        raise NotImplementedError

    def validation_step_end(self, step_output: Any) -> Any:
        """After `validation_step`, with what the strategy gathered."""
        return step_output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate `batch`; signature as `validation_step`."""
        raise NotImplementedError

    def test_step_end(self, step_output: Any) -> Any:
        """After `test_step`, with what the strategy gathered."""
        return step_output

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict for `batch`; by default `self(batch)`. Signature as `validation_step`."""
        return self(args[0] if args else kwargs["batch"])

    # ---------------------------------------------------------------- configuration

    def configure_optimizers(self) -> Any:
        """Return an optimizer; a list of them; (optimizers, schedulers); a dict or several, with "optimizer" and
        "lr_scheduler" (a scheduler, or a dict with `scheduler`, `interval` ("epoch" | "step"), `frequency`, `monitor`,
        `strict`, `name`); or None to train without.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a configure_optimizers(self) to be fitted.")

    def configure_model(self) -> None:
        """Create layers lazily, in the worker. Must do nothing when called again."""

    def configure_callbacks(self) -> list[Callback | WorkerCallback] | Callback | WorkerCallback:
        """Callbacks that this module wants; one of the trainer's of the same type is replaced."""
        return []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients before the step; by default as the Trainer's arguments say."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of the optimizer's parameters by their total norm ("norm") or each value ("value")."""
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ConfigurationError(f'gradient_clip_algorithm={gradient_clip_algorithm!r}: give "norm" or "value".')
        view = self.__dict__.get("_view")
        if view is not None:
            view.unscale(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    # ---------------------------------------------------------------- optimisation

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them if there are several. The argument is accepted for compatibility."""
        optimizers = self.trainer.given_optimizers or self.trainer.optimizers
        return optimizers[0] if len(optimizers) == 1 else optimizers

    def lr_schedulers(self) -> Any:
        """The scheduler, the list of them if there are several, or None."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not schedulers else schedulers[0] if len(schedulers) == 1 else schedulers

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

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In manual optimization, call this instead of `loss.backward()`: it scales and synchronises gradients."""
        if self.automatic_optimization:
            raise ConfigurationError(
                "manual_backward() with automatic optimization: set self.automatic_optimization = False in __init__, "
                "or return the loss from training_step."
            )
        self.trainer.manual_backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Let only this optimizer's parameters require gradients, until `untoggle_optimizer`."""
        own = {p for group in optimizer.param_groups for p in group["params"]}
        states: dict[Tensor, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if parameter not in states:
                        states[parameter] = parameter.requires_grad
                        parameter.requires_grad = parameter.requires_grad and parameter in own
        self.__dict__["_toggled"] = states

    def untoggle_optimizer(self, optimizer: Optimizer) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, requires_grad in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = requires_grad

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Iterator[None]:
        """`toggle_optimizer` for the length of a `with` block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather tensors of all workers: each tensor in `data` becomes one of shape (workers, *shape).

        All workers must call it, with equal shapes. With `sync_grads`, gradients flow back to each worker's part.
        """
        return self.trainer.all_gather(data, group=group, sync_grads=sync_grads)

    def freeze(self) -> None:
        """No parameter requires gradients; evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """All parameters require gradients; training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    # ---------------------------------------------------------------- checkpoints

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: CheckpointPath,
        map_location: Any = "cpu",
        hparams_file: None = None,
        strict: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the module from a checkpoint: its saved hyperparameters, then its weights. Needs no Ray.

        Args:
            checkpoint_path: A checkpoint's directory, its URI, or Ray's object for it (`result.checkpoint` of a trial).
            map_location: Where to put the weights, as for `torch.load`.
            hparams_file: Not supported: hyperparameters are read from the checkpoint.
            strict: Whether state-dict keys must match; default: the module's `strict_loading`.
            overrides: Arguments for `__init__` that the checkpoint lacks or that shall differ.

        Raises:
            CheckpointError: No checkpoint, or not a readable one.
            ConfigurationError: An argument of `__init__` is in neither place.
        """
        from raytrainer.checkpoint import load_into, read_checkpoint

        checkpoint = read_checkpoint(checkpoint_path, map_location=map_location)
        module: Self = construct(cls, checkpoint.get("hyper_parameters") or {}, overrides)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        load_into(module, checkpoint["state_dict"], module.strict_loading if strict is None else strict)
        device = next((value.device for value in checkpoint["state_dict"].values() if isinstance(value, Tensor)), None)
        return module if device is None else module.to(device)

    def export_weights(self, path: str | Path) -> None:
        """Write the weights alone, for use without raytrainer.

        Args:
            path: A file; ".safetensors" gives that format, anything else a state dict for `torch.load`.
        """
        from raytrainer.checkpoint import export_weights

        export_weights(self, path)

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
        """After each training batch; `outputs` is a dict with the detached "loss", or None."""

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
