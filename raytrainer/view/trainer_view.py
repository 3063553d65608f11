"""`TrainerView`: what `self.trainer` is inside a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raytrainer.data.transfer import map_leaves
from raytrainer.loggers.logger import Logger
from raytrainer.metric_messages import News
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import Settings
from raytrainer.stateful_callback import StatefulCallback
from raytrainer.strategies.strategy import Strategy
from raytrainer.view.answered_names import AnsweredNames
from raytrainer.view.scheduler_config import SchedulerConfig
from raytrainer.view.stop_request import StopRequest

__all__ = ["TrainerView"]


@dataclass
class TrainerView(AnsweredNames, StopRequest):
    """The run, as module and worker callbacks may see it. Set `should_stop` to ask for the end of training.

    The Trainer's arguments that concern a run are attributes too: `limit_train_batches`, `val_check_interval`, ...

    Attributes:
        settings: The validated settings of the run.
        ranks: This worker's place.
        stage: "fit", "validate", "test" or "predict": what was called.
        running: What runs now: "train", "sanity", "validate", "test", "predict", or None in between.
        global_step: Optimizer steps done.
        current_epoch: Index of the epoch in progress.
        is_last_batch: Whether training's batch is the last one of its epoch. Where a loader's length is unknown, that
            is not known at batches where its state is kept before it reads ahead.
        log_dir: As of the driver's Trainer, on whose machine the folder is.
        interrupted: Known from `on_train_end` on: Ctrl-C was pressed, and the run should end soon.
        optimizers: The optimizers.
        lr_scheduler_configs: The schedulers and when they step.
        forward_epoch: Runs `training_step` on every batch of an epoch (of no more than the longest one trained here),
            without gradients, steps or logging; all workers must call it together, in `on_train_end`. For statistics
            such as those of batch normalisation.
        logger: Takes `log_...` calls for the driver's loggers; None if there are none.
        batch_indices: Of the samples of a prediction batch in their dataset, where a `BasePredictionWriter` asks for
            them; None: no sampler chooses them.
        samplers: Asked on logging steps for values of this worker alone (of its GPU, say), for the loggers; a worker
            callback may add to them. Names must differ from worker to worker, or end in "/min", "/max", "/sum" or
            "/mean", which says what becomes of the workers' values.
    """

    settings: Settings
    ranks: Ranks
    strategy: Strategy
    stage: str
    default_root_dir: str = "."
    log_dir: str = "."
    running: str | None = None
    global_step: int = 0
    current_epoch: int = 0
    is_last_batch: bool = False
    interrupted: bool = False
    optimizers: list[Optimizer] = field(default_factory=list)
    lr_scheduler_configs: list[SchedulerConfig] = field(default_factory=list)
    callbacks: Sequence[StatefulCallback] = field(default_factory=list)
    datamodule: Any = None
    logger: Logger | None = None
    metrics: MetricStore = None  # type: ignore[assignment]  # set right after construction, since it needs the view
    loader_source: Callable[[str], Any] = lambda stage: None
    length_source: Callable[[str], Any] = lambda stage: None
    epoch_length_source: Callable[[int], int | None] = lambda epoch: None
    manual_backward: Callable[..., None] = lambda *args: None
    forward_epoch: Callable[[], None] = lambda: None
    unscale: Callable[[Optimizer], None] = lambda optimizer: None
    skipped_source: Callable[[], int] = lambda: 0
    given_optimizers: list[Any] | None = None  # what stands for `optimizers` in user code, where that differs
    batch_indices: list[Any] | None = None
    samplers: list[Callable[[], dict[str, float]]] = field(default_factory=list)
    modes: dict[Any, bool] = field(default_factory=dict)

    # ranks
    @property
    def global_rank(self) -> int:
        return self.ranks.rank

    @property
    def local_rank(self) -> int:
        return self.ranks.local_rank

    @property
    def node_rank(self) -> int:
        return self.ranks.node_rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def skipped_steps(self) -> int:
        """Steps that precision="16-mixed" has left out for infinite gradients; `global_step` counts them too.

        Waits for the device with a fused optimizer.
        """
        return self.skipped_source()

    @property
    def num_nodes(self) -> int:
        return self.ranks.num_nodes

    @property
    def num_devices(self) -> int:
        return self.ranks.local_world_size

    @property
    def is_global_zero(self) -> bool:
        return self.ranks.rank == 0

    def hear(self, news: News | None) -> None:
        """Take up what the driver tells, if it does."""
        if news is not None:
            self.metrics.take(news.metrics)
            self.hear_stop(news.stop)

    # settings
    @property
    def max_epochs(self) -> int:
        """-1: no limit."""
        return -1 if self.settings.max_epochs is None else self.settings.max_epochs

    @property
    def min_epochs(self) -> int:
        return self.settings.min_epochs

    @property
    def max_steps(self) -> int:
        """-1: no limit."""
        return -1 if self.settings.max_steps is None else self.settings.max_steps

    @property
    def min_steps(self) -> int | None:
        return self.settings.min_steps

    @property
    def accumulate_grad_batches(self) -> int:
        return self.settings.accumulated(self.current_epoch)

    @property
    def gradient_clip_val(self) -> float | None:
        return self.settings.gradient_clip_val

    @property
    def gradient_clip_algorithm(self) -> str:
        return self.settings.gradient_clip_algorithm

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def log_every_n_steps(self) -> int:
        return self.settings.log_every_n_steps

    @property
    def fast_dev_run(self) -> int:
        return self.settings.fast_dev_run

    # metrics
    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """What has been logged, by name, as 0-dim tensors; of evaluations only epoch values.

        While a batch runs, step values are those that this worker has logged in it; in the hooks at the end of an epoch
        or evaluation, and from then on, epoch values are over all workers (what such a hook logs itself, once it has
        ended).
        """
        return self.metrics.show().callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Likewise what is meant for the loggers, by the names that these are given."""
        return self.metrics.show().logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """Likewise what was logged with `prog_bar=True`, as numbers."""
        return self.metrics.show().progress

    # what runs; before, after and in between: what was called
    @property
    def _now(self) -> str:
        return self.running or {"fit": "train"}.get(self.stage, self.stage)

    @property
    def training(self) -> bool:
        return self._now == "train"

    @property
    def sanity_checking(self) -> bool:
        return self.running == "sanity"

    @property
    def validating(self) -> bool:
        return self._now == "validate"

    @property
    def testing(self) -> bool:
        return self._now == "test"

    @property
    def predicting(self) -> bool:
        return self._now == "predict"

    @property
    def evaluating(self) -> bool:
        """Whether a validation, test or sanity check runs."""
        return self._now in ("validate", "test", "sanity")

    # data
    @property
    def train_dataloader(self) -> Any:
        return self.loader_source("train")

    @property
    def val_dataloaders(self) -> Any:
        return self.loader_source("val")

    @property
    def test_dataloaders(self) -> Any:
        return self.loader_source("test")

    @property
    def predict_dataloaders(self) -> Any:
        return self.loader_source("predict")

    @property
    def num_training_batches(self) -> int | float:
        """Batches of an epoch on this worker; infinity where unknown."""
        length = self.length_source("train")
        return float("inf") if length is None else length

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches of each validation loader on this worker; infinity where unknown."""
        return [float("inf") if n is None else n for n in self.length_source("val")]

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that the whole of `fit` will make, by its limits; infinity where there is none."""
        settings = self.settings
        if settings.max_steps is not None:
            return settings.max_steps
        if settings.max_epochs is None:
            return float("inf")
        if self.num_training_batches == float("inf"):
            return float("inf")
        batches = [self.epoch_length_source(epoch) or 0 for epoch in range(settings.max_epochs)]
        return sum(-(-count // settings.accumulated(epoch)) for epoch, count in enumerate(batches))

    @property
    def loggers(self) -> list[Logger]:
        """`logger`, which stands for all of them, in a list; empty if there is none."""
        return [] if self.logger is None else [self.logger]

    # services
    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """See `Module.all_gather`."""
        device = self.strategy.device

        def leaf(value: Any) -> Any:
            if isinstance(value, (int, float, bool)):
                value = torch.tensor(value, device=device)
            return self.strategy.all_gather(value, sync_grads) if isinstance(value, Tensor) else value

        return map_leaves(data, leaf)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all workers."""
        self.strategy.barrier()

    def restore_modes(self) -> None:
        """Put every submodule back into the train or eval mode it was in before evaluation."""
        for module, training in self.modes.items():
            if module.training is not training:  # setting one takes a module microseconds
                module.training = training
