"""`AttachedModule`: a torch.nn.Module that knows the run it is part of: where it is, and how to log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from raytrainer.errors import MetricError
from raytrainer.loggers.logger import Logger
from raytrainer.private.torch_private import without_compiled
from raytrainer.view.last_trainer import keep_trainer, last_trainer
from raytrainer.view.trainer_view import TrainerView

__all__ = ["AttachedModule"]

log = logging.getLogger("raytrainer")


class AttachedModule(nn.Module):
    """What a `Module` reads of its run, and tells it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_view"] = None
        self.__dict__["_device"] = torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        # the view and compiled code belong to one process
        return without_compiled(self.__dict__) | {"_view": None, "_trainer": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        result: Self = super()._apply(fn, recurse)
        # where an empty tensor ends up is where everything else went
        self.__dict__["_device"] = fn(torch.empty(0, device=self.device)).device
        return result

    # ---------------------------------------------------------------- where am I

    @property
    def trainer(self) -> TrainerView:
        """The run as the module may see it: ranks, counters, limits, metrics. After it, the driver's Trainer.

        Where no run is on, it may be set, for this module and those in it; None: there is none.

        Raises:
            RuntimeError: The module is not attached to a run, and was not, or that Trainer is gone.
        """
        view = self.__dict__.get("_view") or last_trainer(self)
        if view is None:
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a Trainer: it is from setup() to teardown() of a run, so "
                f"what needs self.trainer goes into setup(self, stage) or a later hook, not into __init__."
            )
        return view  # type: ignore[no-any-return]

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        for part in self.modules():
            if isinstance(part, AttachedModule):
                keep_trainer(part, trainer)

    @property
    def device(self) -> torch.device:
        """The device of this module's parameters and batches."""
        return self.__dict__.get("_device") or torch.device("cpu")

    @property
    def device_mesh(self) -> Any:
        """The workers as torch's DeviceMesh, for `configure_model`, with strategies "fsdp" and `ModelParallel`.

        Its dimensions are "data_parallel" and "tensor_parallel", with "replicate" before them where there are several
        copies. None with all other strategies, and outside a run.
        """
        view = self.__dict__.get("_view")
        return None if view is None else view.strategy.device_mesh

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
        """Optimizer steps done in this run, or the last one; 0 before any."""
        view = self.__dict__.get("_view") or last_trainer(self)
        return 0 if view is None else view.global_step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch in progress; after a fit, the number of epochs completed; 0 before any."""
        view = self.__dict__.get("_view") or last_trainer(self)
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
        *,
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
            sync_dist: Reduce *step* values over workers too, by `reduce_fx`, for loggers and callbacks on the driver;
                epoch values always are.
            sync_dist_group: Not supported: must be None.
            add_dataloader_idx: With several evaluation loaders, add "/dataloader_idx_i" to the name.
            batch_size: Samples in the batch, the weight of the mean. Default: what the batch says of itself (graphs of
                PyTorch Geometric, TensorDict), else the first dimension of its first tensor that has one; where neither
                is to be had, 1, with a warning.
            metric_attribute: Accepted for compatibility.
            rank_zero_only: Only rank 0's value counts, also for epoch values.

        Raises:
            MetricError: The value is no scalar, the hook allows no logging, or options differ from an earlier call.
        """
        view = self.__dict__.get("_view")
        if view is None:
            log.warning(
                "self.log(%r, ...) has no effect outside of a run, nor in a Callback, which runs on the driver: derive "
                "that from WorkerCallback.",
                name,
            )
            return
        options = prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only
        view.metrics.log(name, value, options, batch_size, sync_dist_group)

    def log_dict(self, dictionary: Mapping[str, Any], **options: Any) -> None:
        """`log` each item, with the same options; also those of a `torchmetrics.MetricCollection`."""
        if not hasattr(dictionary, "items"):
            raise MetricError(f"self.log_dict({dictionary!r}): give a dict of names and values, or a MetricCollection.")
        items: Any = dictionary.items
        # a collection copies the states that its members share, unless told not to
        for name, value in items(copy_state=False) if hasattr(dictionary, "compute_groups") else items():
            self.log(name, value, **options)
